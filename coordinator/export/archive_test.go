package export

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	images "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/plugins/content/local"
	sessioncontent "github.com/moby/buildkit/session/content"
	sessionexporter "github.com/moby/buildkit/session/exporter"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/manifest"
)

var archiveExport = []split.Export{{Kind: split.KindArchive}}

// store is a worker's content store with an image in it.
type store struct {
	content.Store
	index manifest.Leg
}

func newStore(t *testing.T) *store {
	t.Helper()
	s, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &store{Store: s}
}

func (s *store) add(t *testing.T, mediaType string, blob []byte) ocispecs.Descriptor {
	t.Helper()
	d := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	if err := content.WriteBlob(t.Context(), s, d.Digest.String(), bytes.NewReader(blob), d); err != nil {
		t.Fatal(err)
	}
	return d
}

func (s *store) addJSON(t *testing.T, mediaType string, v any) ocispecs.Descriptor {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return s.add(t, mediaType, raw)
}

// image puts an image of a platform into the store, whose layers are given, and its index.
func (s *store) image(t *testing.T, arch string, layers ...string) {
	t.Helper()
	m := ocispecs.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageManifest}
	m.Config = s.addJSON(t, ocispecs.MediaTypeImageConfig, ocispecs.Image{Platform: ocispecs.Platform{OS: "linux", Architecture: arch}})
	for _, l := range layers {
		m.Layers = append(m.Layers, s.add(t, ocispecs.MediaTypeImageLayer, []byte(l)))
	}
	d := s.addJSON(t, m.MediaType, m)
	d.Platform = &ocispecs.Platform{OS: "linux", Architecture: arch}
	s.index = manifest.Leg{Platform: *d.Platform}
	s.index.Descriptor = s.addJSON(t, ocispecs.MediaTypeImageIndex, ocispecs.Index{Versioned: m.Versioned, MediaType: ocispecs.MediaTypeImageIndex, Manifests: []ocispecs.Descriptor{d}})
	blob, err := content.ReadBlob(t.Context(), s, s.index.Descriptor)
	if err != nil {
		t.Fatal(err)
	}
	s.index.Blob = blob
}

// response is what an exporter answers of an image.
func response(t *testing.T, d ocispecs.Descriptor) map[string]string {
	t.Helper()
	raw, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"containerimage.descriptor": base64.StdEncoding.EncodeToString(raw), "containerimage.digest": d.Digest.String()}
}

// write writes an image as BuildKit's exporter does.
func (s *store) write(t *testing.T, w io.Writer, d ocispecs.Descriptor, names ...string) error {
	t.Helper()
	return images.Export(t.Context(), s, w, images.WithManifest(d, names...), images.WithAllPlatforms(), images.WithSkipDockerManifest())
}

// exported brings the archives of two legs to the point where they are merged.
func exported(t *testing.T, client *target, stores ...*store) (*rig, manifest.Index) {
	t.Helper()
	r := newRig(t, t.TempDir(), clientOf(t, client.attach()), archiveExport, parts(len(stores))...)
	wantNone(t, r.each(func(leg int, w worker) error {
		d := stores[leg].index.Descriptor
		return sendFile(t.Context(), w, response(t, d), func(out io.Writer) error { return stores[leg].write(t, out, d) })
	})...)
	var legs []manifest.Leg
	for i := range stores {
		written, err := r.Written(0, i)
		if err != nil {
			t.Fatal(err)
		}
		if written.Descriptor.Digest != stores[i].index.Descriptor.Digest || !bytes.Equal(written.Blob, stores[i].index.Blob) || written.Response["containerimage.digest"] == "" {
			t.Errorf("leg %d wrote %+v", i, written)
		}
		legs = append(legs, manifest.Leg{Platform: stores[i].index.Platform, Descriptor: written.Descriptor, Blob: written.Blob})
	}
	index, err := manifest.Assemble(legs, manifest.Annotations{})
	if err != nil {
		t.Fatal(err)
	}
	return r, index
}

func TestArchive_IsThatOfOneBuildkitd(t *testing.T) {
	t.Parallel()
	amd, arm, both := newStore(t), newStore(t), newStore(t)
	common := strings.Repeat("common", 50_000)
	amd.image(t, "amd64", common, "only amd")
	arm.image(t, "arm64", common, "only arm", "")
	both.image(t, "amd64", common, "only amd")
	both.image(t, "arm64", common, "only arm", "")
	file := &target{}
	r, index := exported(t, file, amd, arm)
	both.add(t, index.Descriptor.MediaType, index.Blob)
	var want bytes.Buffer
	wantNone(t, both.write(t, &want, index.Descriptor, "docker.io/library/a:1", "docker.io/library/b:2"))

	told := map[string]string{"containerimage.digest": index.Descriptor.Digest.String(), "image.name": "docker.io/library/a:1,docker.io/library/b:2"}
	out := Archive{Descriptor: index.Descriptor, Blob: index.Blob, Names: []string{"docker.io/library/a:1", "docker.io/library/b:2"}, Response: told}
	wantNone(t, r.Send(t.Context(), out))
	if !bytes.Equal(file.content, want.Bytes()) || !file.closed {
		t.Errorf("%d bytes, want %d; closed: %t", len(file.content), want.Len(), file.closed)
	}
	for k, v := range told {
		if file.header[k] != v {
			t.Errorf("the client was told %v", file.header)
		}
	}
}

func TestArchive_IntoTheClientsContentStore(t *testing.T) {
	t.Parallel()
	amd, arm, client := newStore(t), newStore(t), newStore(t)
	amd.image(t, "amd64", "only amd")
	arm.image(t, "arm64", "only arm")
	r, index := exported(t, &target{}, amd, arm)
	a := r.captures[0].(*archive)
	a.client = clientOf(t, sessioncontent.NewAttachable(map[string]content.Store{"export": client}))
	wantNone(t, r.Send(t.Context(), Archive{Descriptor: index.Descriptor, Blob: index.Blob, Store: true}))
	for _, s := range []*store{amd, arm} {
		if err := s.Walk(t.Context(), func(i content.Info) error {
			_, err := client.Info(t.Context(), i.Digest)
			if i.Digest == s.index.Descriptor.Digest {
				if err == nil {
					t.Error("the client was given a leg's own index")
				}
				return nil
			}
			return err
		}); err != nil {
			t.Errorf("the client lacks something: %v", err)
		}
	}
	if _, err := client.Info(t.Context(), index.Descriptor.Digest); err != nil {
		t.Error(err)
	}
}

func TestArchive_WhatTheClientSays(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		file  *target
		words string
	}{
		"it has the file, which is fine": {&target{none: true}, ""},
		"it refuses":                     {&target{refuse: errors.New("not into this folder")}, "not into this folder"},
		"its disk is full":               {&target{broken: errors.New("no space")}, "no space"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			amd := newStore(t)
			amd.image(t, "amd64", strings.Repeat("x", 1<<20))
			r, index := exported(t, test.file, amd)
			err := r.Send(t.Context(), Archive{Descriptor: index.Descriptor, Blob: index.Blob})
			if (err == nil) != (test.words == "") || err != nil && !strings.Contains(err.Error(), test.words) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestArchive_SharesThatAreNotWholeAreRefused(t *testing.T) {
	t.Parallel()
	amd := newStore(t)
	amd.image(t, "amd64", "only amd")
	var whole bytes.Buffer
	wantNone(t, amd.write(t, &whole, amd.index.Descriptor))
	other := response(t, ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromString("else"), Size: 4})
	large := response(t, ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromString("else"), Size: manifest.MaxBlob + 1})
	for name, test := range map[string]struct {
		header  map[string]string
		content []byte
		words   string
	}{
		"cut short":                     {response(t, amd.index.Descriptor), whole.Bytes()[:1000], "unexpected EOF"},
		"damaged":                       {response(t, amd.index.Descriptor), bytes.Replace(whole.Bytes(), []byte("only amd"), []byte("only arm"), 1), "is something else"},
		"nothing that anybody told of":  {nil, whole.Bytes(), "reading the image's descriptor"},
		"without its index":             {other, whole.Bytes(), "not exported by any leg"},
		"with an index that is too big": {large, whole.Bytes(), "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, t.TempDir(), clientOf(t), archiveExport, parts(1)...)
			err := sendFile(t.Context(), r.workers[0], test.header, func(w io.Writer) error {
				_, err := w.Write(test.content)
				return err
			})
			if err == nil || !strings.Contains(err.Error(), test.words) {
				t.Errorf("got %v", err)
			}
			if _, err := r.Written(0, 0); status.Code(err) != codes.Internal {
				t.Errorf("the leg has written something: %v", err)
			}
		})
	}
}

func TestMerge_AnswersOnlyWhatItCaptures(t *testing.T) {
	t.Parallel()
	m := New(t.Context(), nil)
	defer func() { wantNone(t, m.Close()) }()
	answers := m.Leg(0).Intercept
	for _, method := range []string{"/moby.filesync.v1.FileSend/DiffCopy", "/moby.exporter.v1.Exporter/FindExporters"} {
		if answers(method, nil) != nil {
			t.Errorf("%s was intercepted before the build's result was known", method)
		}
	}
	m.Begin(Beginning{Exports: []split.Export{{Exporter: 0, Kind: split.KindImage}, {Exporter: 2, Kind: split.KindTar}}})
	for id, want := range map[string]bool{"0": false, "1": false, "2": true, "3": false, "x": false} {
		if got := answers("/moby.filesync.v1.FileSend/DiffCopy", map[string][]string{exporterID: {id}}) != nil; got != want {
			t.Errorf("exporter %s: %t", id, got)
		}
		if answers("/moby.filesync.v1.FileSync/DiffCopy", map[string][]string{exporterID: {id}}) != nil {
			t.Error("a local source was intercepted")
		}
	}
}

func TestMerge_TooLittleSpaceIsItsOwnFault(t *testing.T) {
	t.Parallel()
	for name, kind := range map[string]split.Export{"an archive": archiveExport[0], "a list": treeExport(false)[0]} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, t.TempDir(), clientOf(t), []split.Export{kind}, parts(1)...)
			r.spool.limit = 1000
			var err error
			if kind.Kind == split.KindTree {
				err = sendFiles(t.Context(), r.workers[0], aTree("f"))
			} else {
				amd := newStore(t)
				amd.image(t, "amd64", "a")
				err = sendFile(t.Context(), r.workers[0], response(t, amd.index.Descriptor), func(w io.Writer) error { return amd.write(t, w, amd.index.Descriptor) })
			}
			if err == nil || status.Code(r.Fault()) != codes.ResourceExhausted || !strings.Contains(r.Fault().Error(), "at most 1000") {
				t.Errorf("got %v, fault %v", err, r.Fault())
			}
		})
	}
}

func TestMerge_EachWorkerFindsItsShareOfTheSessionsExporters(t *testing.T) {
	t.Parallel()
	legs := parts(2)
	legs[1].Found = []*sessionexporter.ExporterRequest{{Type: "oci", Attrs: map[string]string{"name": "a"}}}
	r := newRig(t, t.TempDir(), clientOf(t), nil, legs...) // a client without exporters: nothing may reach it
	for i, w := range r.workers {
		client := sessionexporter.NewExporterClient(w.conn)
		resp, err := client.FindExporters(t.Context(), &sessionexporter.FindExportersRequest{Refs: []string{"x"}})
		if err != nil || len(resp.GetExporters()) != i || i > 0 && resp.GetExporters()[0].GetAttrs()["name"] != "a" {
			t.Errorf("leg %d: %v, %v", i, resp, err)
		}
		if _, err := client.FinalizeExport(t.Context(), &sessionexporter.FinalizeExportRequest{}); err != nil {
			t.Errorf("leg %d: %v", i, err)
		}
	}
}

func FuzzUnpack(f *testing.F) {
	var seed bytes.Buffer
	w := tar.NewWriter(&seed)
	for name, blob := range map[string]string{"oci-layout": "{}", "blobs/sha256/" + digest.FromString("a").Encoded(): "a", "blobs/sha256/" + digest.FromString("b").Encoded(): "other", "blobs/sha256/../../x": "y", "blobs/md5/00": "z"} {
		_ = w.WriteHeader(&tar.Header{Name: name, Size: int64(len(blob)), Mode: 0o644, Typeflag: tar.TypeReg})
		_, _ = w.Write([]byte(blob))
	}
	_ = w.Close()
	f.Add(seed.Bytes())
	f.Add(seed.Bytes()[:700])
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, archive []byte) {
		spool := &Spool{dir: dir, limit: 1 << 20}
		s := newShelf(spool)
		_ = s.unpack(bytes.NewReader(archive))
		for d := range s.blobs {
			blob, err := content.ReadBlob(context.Background(), s, ocispecs.Descriptor{Digest: d, Size: s.blobs[d]})
			if err != nil || d.Algorithm().FromBytes(blob) != d {
				t.Errorf("%s holds %q, %v", d, blob, err)
			}
		}
		if err := s.clear(); err != nil || spool.Used() != 0 {
			t.Errorf("%d bytes are still reserved, %v", spool.Used(), err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
}
