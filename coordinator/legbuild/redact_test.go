package legbuild

import (
	"bytes"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/job"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func secretive(secrets ...string) *redactor {
	leg := job.Leg{Secrets: map[string][]byte{}}
	for i, s := range secrets {
		leg.Secrets[string(rune('a'+i))] = []byte(s)
	}
	return newRedactor(leg)
}

func logs(p *archfarmv1.Progress) string {
	var b bytes.Buffer
	for _, l := range p.GetLogs() {
		b.Write(l.GetMsg())
	}
	return b.String()
}

// However a step's output is cut, what comes out is what comes out of it uncut.
func TestRedactor_SecretsCutInPieces(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		const alphabet = "ab\n"
		secret := rapid.StringMatching(`[ab]{4,8}`)
		secrets := rapid.SliceOfN(secret, 1, 3).Draw(t, "secrets")
		whole := strings.Join(rapid.SliceOfN(rapid.OneOf(rapid.SampledFrom(secrets), rapid.StringOfN(rapid.RuneFrom([]rune(alphabet)), 0, 6, -1)), 1, 8).Draw(t, "parts"), "")
		r := secretive(secrets...)
		out := ""
		for rest := whole; rest != ""; {
			n := rapid.IntRange(1, len(rest)).Draw(t, "n")
			p := &archfarmv1.Progress{Logs: []*archfarmv1.VertexLog{{Vertex: "v", Stream: 1, Msg: []byte(rest[:n])}}}
			r.progress(p)
			out += logs(p)
			rest = rest[n:]
		}
		p := &archfarmv1.Progress{Vertexes: []*archfarmv1.Vertex{{Digest: "v", Completed: timestamppb.Now()}}}
		r.progress(p)
		out += logs(p)
		if want := r.text(whole); out != want {
			t.Fatalf("%q became %q, not %q", whole, out, want)
		}
		for _, s := range secrets {
			if strings.Contains(out, s) {
				t.Fatalf("%q has %q", out, s)
			}
		}
		if p := r.rest(); len(p.GetLogs()) != 0 {
			t.Fatalf("%v is still held back", p)
		}
	})
}

func TestRedactor_EverythingThatIsText(t *testing.T) {
	t.Parallel()
	r := secretive("hunter2", "-----BEGIN KEY-----\nMIIEvQIBADANBg\nshort\n-----END KEY-----\n", "abc")
	p := &archfarmv1.Progress{
		Vertexes: []*archfarmv1.Vertex{{Digest: "v", Name: "RUN hunter2", Error: "hunter2", ProgressGroup: &archfarmv1.ProgressGroup{Name: "hunter2"}}},
		Statuses: []*archfarmv1.VertexStatus{{Id: "hunter2", Name: "hunter2"}},
		Warnings: []*archfarmv1.VertexWarning{{Short: []byte("hunter2"), Detail: [][]byte{[]byte("hunter2")}, Url: "hunter2"}},
		Logs: []*archfarmv1.VertexLog{{Vertex: "v", Msg: []byte("abc short hunter2\n> MIIEvQIBADANBg\n")}, {Vertex: "v", Stream: 2, Msg: []byte("hun")},
			{Vertex: "w", Stream: 2, Msg: []byte("ter2")}},
	}
	r.progress(p)
	if text := p.String(); strings.Contains(text, "hunter2") || strings.Contains(text, "MIIE") {
		t.Error(text)
	}
	if got := logs(p); got != "abc short ***\n> ***\nter2" {
		t.Errorf("the logs are %q", got)
	}
	if got := logs(r.rest()); got != "hun" {
		t.Errorf("held back was %q", got)
	}
}

func TestRedactor_Passwords(t *testing.T) {
	t.Parallel()
	r := newRedactor(job.Leg{Credentials: []*archfarmv1.RegistryCredential{{Username: "bob", Password: "builder", IdentityToken: "tokentoken"}}})
	if got := r.text("bob builder tokentoken Ym9iOmJ1aWxkZXI="); got != "bob *** *** ***" {
		t.Error(got)
	}
}

func TestRedactor_WithoutSecretsNothingIsChanged(t *testing.T) {
	t.Parallel()
	p := &archfarmv1.Progress{Logs: []*archfarmv1.VertexLog{{Msg: []byte("x")}, {}}}
	r := secretive()
	r.progress(p)
	if len(p.GetLogs()) != 2 || r.text("x") != "x" {
		t.Error(p)
	}
}
