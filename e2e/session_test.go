package e2e_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// nonce makes what must not come from a cache, and must not be guessed.
func nonce(t *testing.T) string {
	t.Helper()
	raw := make([]byte, 12)
	if _, err := rand.Read(raw); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", raw)
}

func TestSession_OnlyTheClientHasThePassword(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	user, password := "client", nonce(t)
	r.registry = farmtest.StartRegistry(t, r.tools, farmtest.RegistryOptions{User: user, Password: password})
	dir := r.legsContext(t)
	args := []string{"--platform", both, "--push", "-t", r.ref("v1"), dir}

	result := r.Client.TryBuild(t, args...) // this one does not have it
	wantFailure(t, result, "401 Unauthorized")
	r.wantNoTags(t)

	login := farmtest.Login{Host: r.registry.Host, User: user, Password: password}
	client := farmtest.NewClient(t, r.tools, r.Addr, login)
	result = client.Build(t, args...)
	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	r.checkLeg(t, index, "linux/amd64", "x86_64\n")
	r.checkLeg(t, index, "linux/arm64", "told\n")
	if strings.Contains(result.Output+r.Logs(), password) {
		t.Error("the password is in the build's output or in a daemon's log")
	}
}

// onlyOnAMD64 puts an instruction into the amd64 leg of a two-platform Dockerfile; the arm64 leg only copies.
func onlyOnAMD64(instruction string) string {
	return "FROM scratch AS base\nCOPY busybox /bin/busybox\nCOPY extra /extra/\nFROM base AS leg-amd64\n" + instruction +
		"\nFROM base AS leg-arm64\nCOPY extra /extra/\nFROM leg-${TARGETARCH}\n"
}

func TestSession_SecretsReachRUNAndNothingElse(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	secret := nonce(t)
	file := farmtest.WriteFile(t, farmtest.Folder(t), "token", secret)
	script := "/bin/busybox sha256sum < /run/secrets/token > /sum"
	dir := r.context(t, map[string]string{
		"Dockerfile":  onlyOnAMD64(farmtest.Run(script, "--mount=type=secret,id=token,required=true")),
		"extra/extra": t.Name(),
	})
	result := r.Client.Build(t, "--platform", both, "--secret", "id=token,src="+file, "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	image := r.registry.Image(t, r.repo, index.For(t, "linux/amd64"))
	wantEqual(t, "checksum of the secret", strings.Fields(image.Files["sum"] + " -")[0], sha256Hex(secret))
	for name, content := range image.Files {
		if strings.Contains(content, secret) {
			t.Errorf("the secret is in the image's /%s", name)
		}
	}
	if strings.Contains(result.Output+r.Logs(), secret) {
		t.Error("the secret is in the build's output or in a daemon's log")
	}

	result = r.Client.TryBuild(t, "--no-cache", "--platform", both, "--push", "-t", r.ref("none"), dir)
	wantFailure(t, result, "secret token: not found")
	wantList(t, "tags", r.registry.Tags(t, r.repo), "v1")
}

func TestSession_SSHAgentAnswersInRUN(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	socket, fingerprint := startSSHAgent(t)
	dir := r.context(t, map[string]string{
		"Dockerfile":  onlyOnAMD64(farmtest.Run("/extra/sshprobe > /keys", "--mount=type=ssh,required=true")),
		"extra/extra": t.Name(),
	})
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "extra", "sshprobe"), "./e2e/farmtest/sshprobe")
	build.Dir, build.Env = r.tools.Root, append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building sshprobe: %v: %s", err, out)
	}
	r.Client.Build(t, "--platform", both, "--ssh", "default="+socket, "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	image := r.registry.Image(t, r.repo, index.For(t, "linux/amd64"))
	wantEqual(t, "keys that the RUN step saw", image.Files["keys"], fingerprint+"\n")

	result := r.Client.TryBuild(t, "--no-cache", "--platform", both, "--push", "-t", r.ref("none"), dir)
	wantFailure(t, result, "ssh")
	wantList(t, "tags", r.registry.Tags(t, r.repo), "v1")
}

// startSSHAgent starts a real ssh-agent with one new key and returns its socket and the key's fingerprint.
func startSSHAgent(t *testing.T) (socket, fingerprint string) {
	t.Helper()
	program, err := exec.LookPath("ssh-agent")
	if err != nil {
		if os.Getenv("CI") == "true" || os.Getenv(farmtest.RequireEnv) == "require" {
			t.Fatalf("install openssh-client: %v", err)
		}
		t.Skipf("SKIPPED, install openssh-client: %v", err)
	}
	socket = filepath.Join(farmtest.Folder(t), "agent")
	process := farmtest.StartProcess(t, farmtest.Spec{Name: "ssh-agent", Path: program, Args: []string{"-D", "-a", socket}})
	process.WaitOutput(t, startLimit, "its socket", farmtest.Contains("SSH_AUTH_SOCK="))
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.NewClient(conn).Add(agent.AddedKey{PrivateKey: private, Comment: t.Name()}); err != nil {
		t.Fatalf("giving ssh-agent a key: %v", err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return socket, ssh.FingerprintSHA256(key)
}
