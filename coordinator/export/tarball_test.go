package export

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/util/staticfs"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/split"
)

var tarExport = []split.Export{{Kind: split.KindTar}}

// drawTree draws a tree of files.
func drawTree(t *rapid.T, label string) *staticfs.FS {
	tree := staticfs.NewFS()
	for path, content := range drawFiles(t, label) {
		addFile(tree, path, content)
	}
	return tree
}

// drawFiles draws files by their paths; folders end in a slash. Every folder above is there.
func drawFiles(t *rapid.T, label string) map[string][]byte {
	name := rapid.SampledFrom([]string{"a", "a.b", "b", "a-", "c", "ä"})
	files := map[string][]byte{}
	for range rapid.IntRange(0, 6).Draw(t, label+" files") {
		path := name.Draw(t, "name")
		for range rapid.IntRange(0, 2).Draw(t, "depth") {
			if _, file := files[path]; file {
				path += "x" // a file cannot be a folder, too
			}
			files[path+"/"] = nil
			path += "/" + name.Draw(t, "name")
		}
		if _, folder := files[path+"/"]; folder {
			continue
		}
		files[path] = rapid.SliceOfN(rapid.Byte(), 0, 3000).Draw(t, "content")
	}
	for path := range files {
		if _, both := files[path+"/"]; both {
			delete(files, path)
		}
	}
	return files
}

func addFile(tree *staticfs.FS, path string, content []byte) {
	if folder, ok := strings.CutSuffix(path, "/"); ok {
		tree.Add(folder, &types.Stat{Mode: uint32(os.ModeDir | 0o755), ModTime: 1e18}, nil)
		return
	}
	tree.Add(path, &types.Stat{Mode: 0o644, ModTime: 1e18}, content)
}

// inFolder puts a tree into a platform's folder, as BuildKit's exporters do.
func inFolder(t tester, trees []*staticfs.FS, parts []Part) fsutil.FS {
	t.Helper()
	var dirs []fsutil.Dir
	for i, tree := range trees {
		dirs = append(dirs, fsutil.Dir{FS: tree, Stat: &types.Stat{Mode: uint32(os.ModeDir | 0o755), Path: folder(parts[i].Key)}})
	}
	all, err := fsutil.SubDirFS(dirs)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestTarball_PropertyIsThatOfOneBuildkitd(t *testing.T) {
	t.Parallel()
	spool := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		legs := rapid.Permutation(parts(rapid.IntRange(1, 4).Draw(t, "legs"))).Draw(t, "order of the platforms")
		trees := make([]*staticfs.FS, len(legs))
		for i := range legs {
			trees[i] = drawTree(t, legs[i].Key)
			legs[i].Leg = i
		}
		var want bytes.Buffer
		if err := fsutil.WriteTar(context.Background(), inFolder(t, trees, legs), &want); err != nil {
			t.Fatal(err)
		}
		file := &target{}
		r := newRig(t, spool, clientOf(t, file.attach()), tarExport, legs...)
		wantNone(t, r.each(func(leg int, w worker) error {
			return sendFile(context.Background(), w, nil, func(out io.Writer) error {
				return fsutil.WriteTar(context.Background(), inFolder(t, trees[leg:leg+1], legs[leg:leg+1]), out)
			})
		})...)
		if !bytes.Equal(file.content, want.Bytes()) || !file.closed {
			t.Fatalf("%d bytes, want %d; closed: %t", len(file.content), want.Len(), file.closed)
		}
	})
}

func TestBodyWriter_PropertyHoldsBackTheEnd(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var all, out bytes.Buffer
		w := &bodyWriter{to: &out}
		for range rapid.IntRange(0, 10).Draw(t, "writes") {
			chunk := rapid.SliceOfN(rapid.Byte(), 0, 3000).Draw(t, "chunk")
			all.Write(chunk)
			if n, err := w.Write(chunk); n != len(chunk) || err != nil {
				t.Fatal(n, err)
			}
		}
		if got := slices.Concat(out.Bytes(), w.held); !bytes.Equal(got, all.Bytes()) || len(w.held) != min(all.Len(), len(endMark)) {
			t.Fatalf("forwarded %d and held back %d of %d bytes", out.Len(), len(w.held), all.Len())
		}
	})
}

// aTar is a small archive.
func aTar(name string) func(io.Writer) error {
	tree := staticfs.NewFS()
	addFile(tree, name, []byte(name))
	return func(w io.Writer) error { return fsutil.WriteTar(context.Background(), tree, w) }
}

func TestTarball_WhatTheClientSaysIsEveryLegsError(t *testing.T) {
	t.Parallel()
	for name, file := range map[string]*target{
		"it refuses the file": {refuse: status.Error(codes.PermissionDenied, "not into this folder")},
		"its disk is full":    {broken: errors.New("not into this folder: no space")},
		"it has the file":     {none: true},
		"it takes nothing":    nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client, words := clientOf(t), "not supported by the client"
			if file != nil {
				client, words = clientOf(t, file.attach()), "not into this folder"
				if file.none {
					words = "target already exists"
				}
			}
			r := newRig(t, t.TempDir(), client, tarExport, parts(2)...)
			for i, err := range r.each(func(leg int, w worker) error { return sendFile(t.Context(), w, nil, aTar("f")) }) {
				last := i == 1 // the first leg's share may have been on its way before the client said anything
				if (err != nil || last) && (err == nil || !strings.Contains(err.Error(), words)) {
					t.Errorf("leg %d: %v", i, err)
				}
			}
			if r.Fault() != nil {
				t.Errorf("the merging is blamed: %v", r.Fault())
			}
		})
	}
}

func TestTarball_ALegThatBreaksOffEndsTheFileAndTheOthersWait(t *testing.T) {
	t.Parallel()
	for name, breakOff := range map[string]func(cancel func()) func(io.Writer) error{
		"its export fails": func(func()) func(io.Writer) error {
			return func(w io.Writer) error {
				_, err := w.Write(make([]byte, 512))
				return errors.Join(err, errors.New("layer is gone"))
			}
		},
		"it is stopped": func(cancel func()) func(io.Writer) error {
			return func(w io.Writer) error {
				_, err := w.Write(make([]byte, 100_000))
				cancel()
				return err
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := &target{}
			r := newRig(t, t.TempDir(), clientOf(t, file.attach()), tarExport, parts(2)...)
			ctx, stop := context.WithCancel(t.Context())
			second := make(chan error, 1)
			go func() { second <- sendFile(ctx, r.workers[1], nil, aTar("f")) }()
			firstCtx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if err := sendFile(firstCtx, r.workers[0], nil, breakOff(cancel)); err == nil {
				t.Error("the leg that broke off succeeded")
			}
			select {
			case err := <-second:
				t.Errorf("the other leg ended before its build did: %v", err)
			default:
			}
			stop()
			if err := <-second; status.Code(err) != codes.Canceled && !errors.Is(err, context.Canceled) {
				t.Errorf("the other leg: %v", err)
			}
		})
	}
}

func TestTarball_EachLegHasOneTurn(t *testing.T) {
	t.Parallel()
	file := &target{}
	r := newRig(t, t.TempDir(), clientOf(t, file.attach()), tarExport, parts(1)...)
	wantNone(t, sendFile(t.Context(), r.workers[0], nil, aTar("f")))
	if err := sendFile(t.Context(), r.workers[0], nil, aTar("f")); status.Code(err) != codes.AlreadyExists {
		t.Errorf("a second archive: %v", err)
	}
	if err := sendFile(t.Context(), r.worker(t, 7), nil, aTar("f")); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a leg without a part: %v", err)
	}
}

func TestFolder_IsBuildkitsNameOfAPlatform(t *testing.T) {
	t.Parallel()
	for key, want := range map[string]string{"linux/arm/v7": "linux_arm_v7", `a\b:c`: "a_b_c", ".": "_", "..": "__", "": ""} {
		if got := folder(key); got != want {
			t.Errorf("%q: %q, want %q", key, got, want)
		}
	}
}
