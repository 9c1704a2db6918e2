package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// image is what stands in for one that the suites would pull.
type image struct {
	name   string
	layers [][]byte
	config ocispec.ImageConfig
}

// images are those that the suites name, made of what this machine has: busybox, and the Dockerfile
// frontend built from BuildKit's module. Tests that install packages fail on a plain buildkitd, too.
func images(ctx context.Context, frontend string) ([]image, error) {
	busybox, err := busyboxLayer(ctx, map[string]string{"etc/issue": "archfarm\n"})
	if err != nil {
		return nil, err
	}
	alpine, err := busyboxLayer(ctx, map[string]string{
		"etc/alpine-release": "3.18.0\n",
		"etc/os-release":     "NAME=\"Alpine Linux\"\nID=alpine\nVERSION_ID=3.18.0\nPRETTY_NAME=\"Alpine Linux v3.18\"\n",
	})
	if err != nil {
		return nil, err
	}
	dockerfile, err := frontendLayer(frontend)
	if err != nil {
		return nil, err
	}
	shell := ocispec.ImageConfig{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"sh"}}
	var out []image
	for _, name := range []string{"library/busybox:latest", "library/busybox:stable-musl", "amd64/debian:bullseye-20230109-slim", "tonistiigi/test:nolayers", "cpuguy83/buildkit-foreign:latest", "tonistiigi/hellofs:latest", "moby/buildkit:buildx-stable-1"} {
		out = append(out, image{name: name, layers: [][]byte{busybox}, config: shell})
	}
	out = append(out, image{name: "library/alpine:latest", layers: [][]byte{alpine}, config: shell})
	for _, name := range []string{"docker/dockerfile-upstream:1.18.0", "docker/dockerfile:1", "docker/dockerfile-upstream:master"} {
		out = append(out, image{name: name, layers: [][]byte{dockerfile}, config: ocispec.ImageConfig{
			Entrypoint: []string{"/bin/dockerfile-frontend"},
			Labels: map[string]string{
				"moby.buildkit.frontend.network.none": "true",
				"moby.buildkit.frontend.caps":         "moby.buildkit.frontend.inputs,moby.buildkit.frontend.subrequests,moby.buildkit.frontend.contexts",
			},
		}})
	}
	return out, nil
}

type entry struct {
	name, link string
	mode       int64
	body       []byte
}

// busyboxLayer is a root with busybox under every name that it answers to.
func busyboxLayer(ctx context.Context, files map[string]string) ([]byte, error) {
	program, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	list, err := exec.CommandContext(ctx, program, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("listing busybox's applets: %w", err)
	}
	var entries []entry
	for _, dir := range []string{"bin/", "dev/", "etc/", "home/", "lib/", "proc/", "root/", "sbin/", "sys/", "usr/", "usr/bin/", "usr/sbin/", "var/", "var/spool/", "var/spool/mail/"} {
		entries = append(entries, entry{name: dir, mode: 0o755})
	}
	entries = append(entries, entry{name: "tmp/", mode: 0o1777}, entry{name: "bin/busybox", mode: 0o755, body: binary},
		entry{name: "etc/passwd", mode: 0o644, body: []byte("root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n")},
		entry{name: "etc/group", mode: 0o644, body: []byte("root:x:0:\ndaemon:x:1:\nnobody:x:65534:\n")})
	for name, body := range files {
		entries = append(entries, entry{name: name, mode: 0o644, body: []byte(body)})
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if applet = strings.TrimPrefix(applet, "/"); applet != "bin/busybox" && applet != "linuxrc" {
			entries = append(entries, entry{name: applet, link: "bin/busybox", mode: 0o755})
		}
	}
	return layer(entries)
}

func frontendLayer(program string) ([]byte, error) {
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	return layer([]entry{{name: "bin/", mode: 0o755}, {name: "bin/dockerfile-frontend", mode: 0o755, body: binary}})
}

func layer(entries []entry) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		header := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.body)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}
		switch {
		case e.link != "":
			header.Typeflag, header.Linkname = tar.TypeLink, e.link
		case strings.HasSuffix(e.name, "/"):
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.body); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
}

func compress(layer []byte) ([]byte, error) {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(layer); err != nil {
		return nil, err
	}
	err := w.Close()
	return out.Bytes(), err
}

// push writes an image for this machine's platform to a registry.
func (i image) push(ctx context.Context, host string) error {
	ingester, err := contentutil.IngesterFromRef(ctx, host+"/"+i.name)
	if err != nil {
		return err
	}
	write := func(mediaType string, blob []byte) (ocispec.Descriptor, error) {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
		err := content.WriteBlob(ctx, ingester, desc.Digest.String(), bytes.NewReader(blob), desc)
		return desc, err
	}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Config: i.config, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range i.layers {
		packed, err := compress(l)
		if err != nil {
			return err
		}
		desc, err := write(ocispec.MediaTypeImageLayerGzip, packed)
		if err != nil {
			return err
		}
		manifest.Layers = append(manifest.Layers, desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
		config.History = append(config.History, ocispec.History{CreatedBy: "conformance"})
	}
	blob, err := json.Marshal(config)
	if err != nil {
		return err
	}
	if manifest.Config, err = write(ocispec.MediaTypeImageConfig, blob); err != nil {
		return err
	}
	if blob, err = json.Marshal(manifest); err != nil {
		return err
	}
	_, err = write(ocispec.MediaTypeImageManifest, blob)
	return err
}

// fill makes the folder that the suites take their images from.
func fill(ctx context.Context, dir, registry, frontend string) error {
	if _, err := os.Stat(dir + "/complete"); err == nil {
		return nil
	}
	list, err := images(ctx, frontend)
	if err != nil {
		return fmt.Errorf("making the suites' images: %w", err)
	}
	host, stop, err := serve(ctx, dir, registry)
	if err != nil {
		return fmt.Errorf("starting the registry of the suites' images: %w", err)
	}
	defer stop()
	for _, i := range list {
		if err := i.push(ctx, host); err != nil {
			return fmt.Errorf("pushing %s: %w", i.name, err)
		}
	}
	return os.WriteFile(dir+"/complete", nil, 0o600)
}

// serve runs a registry over the folder, with the configuration that the suites give theirs.
func serve(ctx context.Context, dir, registry string) (host string, stop func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, err
	}
	config := fmt.Sprintf("version: 0.1\nloglevel: debug\nstorage:\n    filesystem:\n        rootdirectory: %s/data\nhttp:\n    addr: 127.0.0.1:0\n", dir)
	if err := os.WriteFile(dir+"/config.yaml", []byte(config), 0o600); err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, registry, "serve", dir+"/config.yaml")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	host, err = listening(stderr)
	if err != nil {
		stop()
		return "", nil, err
	}
	go func() { _, _ = io.Copy(io.Discard, stderr) }() // ends with the process
	return host, stop, nil
}
