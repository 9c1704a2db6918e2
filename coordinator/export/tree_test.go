package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/staticfs"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/split"
)

func treeExport(apart bool) []split.Export {
	return []split.Export{{Kind: split.KindTree, Apart: apart}}
}

// onDisk lists a folder as drawFiles does.
func onDisk(t tester, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name := strings.TrimPrefix(path, dir+"/")
		if d.IsDir() {
			files[name+"/"] = nil
			return nil
		}
		files[name], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// firstConflict is what buildkitd, which checks platform after platform, says.
func firstConflict(trees []map[string][]byte, parts []Part) string {
	owner := map[string]int{}
	for i, files := range trees {
		paths := slices.SortedFunc(maps.Keys(files), fsutil.ComparePath)
		for _, path := range paths {
			if strings.HasSuffix(path, "/") {
				continue
			}
			if first, taken := owner[path]; taken {
				return fmt.Sprintf("cannot overwrite %s from %s with %s when split option is disabled", path, parts[first].Key, parts[i].Key)
			}
			owner[path] = i
		}
	}
	return ""
}

func TestTree_PropertyTheClientReceivesTheUnion(t *testing.T) {
	t.Parallel()
	spool, dir := t.TempDir(), t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		legs := parts(rapid.IntRange(1, 4).Draw(t, "legs"))
		drawn, trees, union := make([]map[string][]byte, len(legs)), make([]*staticfs.FS, len(legs)), map[string][]byte{}
		for i := range legs {
			drawn[i], trees[i] = drawFiles(t, legs[i].Key), staticfs.NewFS()
			for path := range drawn[i] { // a file where another platform has a folder fails at the client, as it does with one buildkitd
				for other := range union {
					if path == other+"/" || path+"/" == other || strings.HasPrefix(path, other+"/") || strings.HasPrefix(other, path+"/") {
						t.Skip()
					}
				}
			}
			for path, content := range drawn[i] {
				addFile(trees[i], path, content)
			}
			maps.Copy(union, drawn[i])
		}
		dest, err := os.MkdirTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		client := clientOf(t, filesync.NewFSSyncTarget(filesync.WithFSSyncDirDelete(0, dest)))
		r := newRig(t, spool, client, treeExport(false), legs...)
		errs := r.each(func(leg int, w worker) error { return sendFiles(context.Background(), w, trees[leg]) })
		if conflict := firstConflict(drawn, legs); conflict != "" {
			if fault := r.Fault(); fault == nil || status.Convert(fault).Message() != conflict {
				t.Fatalf("got %v, want %s", fault, conflict)
			}
			for i, err := range errs {
				if err == nil || !strings.Contains(err.Error(), conflict) {
					t.Fatalf("leg %d: %v", i, err)
				}
			}
			union = map[string][]byte{}
		} else {
			wantNone(t, errs...)
		}
		got := onDisk(t, dest)
		if !maps.EqualFunc(got, union, slices.Equal) {
			t.Fatalf("received %v, want %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(union)))
		}
	})
}

// long is a file's name by which the lists are longer than the window of a stream.
func long(file, leg int) string { return fmt.Sprintf("all/%d-%d-%0100d", file, leg, file) }

func TestTree_ManyFilesOfBothKindsOfLinks(t *testing.T) {
	t.Parallel()
	const n = 800
	trees, want := []*staticfs.FS{staticfs.NewFS(), staticfs.NewFS()}, map[string][]byte{}
	for i, tree := range trees {
		addFile(tree, "all/", nil)
		want["all/"] = nil
		for f := range n {
			name := long(f, i)
			want[name] = fmt.Appendf(nil, "%d of %d", f, i)
			addFile(tree, name, want[name])
		}
		tree.Add(fmt.Sprintf("hard-%d", i), &types.Stat{Mode: 0o644, Linkname: long(0, i)}, nil)
		tree.Add(fmt.Sprintf("soft-%d", i), &types.Stat{Mode: uint32(os.ModeSymlink | 0o777), Linkname: long(1, i)}, nil)
		want[fmt.Sprintf("hard-%d", i)], want[fmt.Sprintf("soft-%d", i)] = want[long(0, i)], want[long(1, i)]
	}
	for _, apart := range []bool{false, true} {
		dest := t.TempDir()
		client := clientOf(t, filesync.NewFSSyncTarget(filesync.WithFSSyncDir(0, dest)))
		legs := parts(2)
		r := newRig(t, t.TempDir(), client, treeExport(apart), legs...)
		wantNone(t, r.each(func(leg int, w worker) error {
			if apart {
				return sendFiles(t.Context(), w, inFolder(t, trees[leg:leg+1], legs[leg:leg+1]))
			}
			return sendFiles(t.Context(), w, trees[leg])
		})...)
		if got := onDisk(t, dest); !apart && !maps.EqualFunc(got, want, slices.Equal) {
			t.Errorf("received %d files, want %d", len(got), len(want))
		} else if apart && len(got) != len(want)+3 {
			t.Errorf("received %d files, want %d in two folders each with a folder", len(got), len(want)+3)
		}
	}
}

// aTree holds one file.
func aTree(name string) *staticfs.FS {
	tree := staticfs.NewFS()
	addFile(tree, name, []byte(name))
	return tree
}

func TestTree_TheLastPlatformsFolderStays(t *testing.T) {
	t.Parallel()
	trees := []*staticfs.FS{aTree("d/a"), aTree("d/b")}
	trees[0].Add("d", &types.Stat{Mode: uint32(os.ModeDir | 0o700)}, nil)
	trees[1].Add("d", &types.Stat{Mode: uint32(os.ModeDir | 0o750)}, nil)
	dest := t.TempDir()
	r := newRig(t, t.TempDir(), clientOf(t, filesync.NewFSSyncTarget(filesync.WithFSSyncDir(0, dest))), treeExport(false), parts(2)...)
	wantNone(t, r.each(func(leg int, w worker) error { return sendFiles(t.Context(), w, trees[leg]) })...)
	info, err := os.Stat(filepath.Join(dest, "d"))
	if err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestTree_TwoPlatformsOfOneFolderAreRefused(t *testing.T) {
	t.Parallel()
	legs := []Part{{Leg: 0, Key: "linux/arm"}, {Leg: 1, Key: "linux_arm"}}
	dest := t.TempDir()
	r := newRig(t, t.TempDir(), clientOf(t, filesync.NewFSSyncTarget(filesync.WithFSSyncDirDelete(0, dest))), treeExport(true), legs...)
	for _, err := range r.each(func(leg int, w worker) error {
		return sendFiles(t.Context(), w, inFolder(t, []*staticfs.FS{aTree("f")}, legs[leg:leg+1]))
	}) {
		if err == nil || !strings.Contains(err.Error(), "duplicate path linux_arm: file exists") {
			t.Error(err)
		}
	}
}

func TestTree_WhatTheClientSaysIsEveryLegsError(t *testing.T) {
	t.Parallel()
	notAFolder := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(notAFolder, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ dest, file, words string }{
		"it cannot make the folder": {filepath.Join(notAFolder, "below"), "f", "not a directory"},
		"in the middle":             {t.TempDir(), strings.Repeat("f", 300), "error from receiver"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, t.TempDir(), clientOf(t, filesync.NewFSSyncTarget(filesync.WithFSSyncDir(0, test.dest))), treeExport(false), parts(2)...)
			for i, err := range r.each(func(leg int, w worker) error {
				return sendFiles(t.Context(), w, aTree(test.file+strconv.Itoa(leg)))
			}) {
				if err == nil || !strings.Contains(err.Error(), test.words) {
					t.Errorf("leg %d: %v", i, err)
				}
			}
			if r.Fault() != nil {
				t.Errorf("the merging is blamed: %v", r.Fault())
			}
		})
	}
	r := newRig(t, t.TempDir(), clientOf(t), treeExport(false), parts(1)...)
	if err := sendFiles(t.Context(), r.workers[0], aTree("f")); err == nil || !strings.Contains(err.Error(), "method /moby.filesync.v1.FileSend/diffcopy not supported by the client") {
		t.Errorf("a client without: %v", err)
	}
}

// brokenFS fails in the middle of its list.
type brokenFS struct{ fsutil.FS }

func (b brokenFS) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	return errors.Join(b.FS.Walk(ctx, target, fn), errors.New("layer is gone"))
}

func TestTree_ALegThatBreaksOffLeavesTheClientAlone(t *testing.T) {
	t.Parallel()
	dest := t.TempDir()
	r := newRig(t, t.TempDir(), clientOf(t, filesync.NewFSSyncTarget(filesync.WithFSSyncDirDelete(0, dest))), treeExport(false), parts(2)...)
	ctx, stop := context.WithCancel(t.Context())
	second := make(chan error, 1)
	go func() { second <- sendFiles(ctx, r.workers[1], aTree("f")) }()
	if err := sendFiles(t.Context(), r.workers[0], brokenFS{aTree("g")}); err == nil || !strings.Contains(err.Error(), "layer is gone") {
		t.Errorf("the leg that broke off: %v", err)
	}
	select {
	case err := <-second:
		t.Errorf("the other leg ended before its build did: %v", err)
	default:
	}
	stop() // the build, of the first leg's error
	if err := <-second; err == nil {
		t.Error("the other leg succeeded")
	}
	if got := onDisk(t, dest); len(got) > 0 {
		t.Errorf("the client received %v", got)
	}
}

// TestTree_ALostLegsFilesComeFromAnotherWorker: before the client knows of any.
func TestTree_ALostLegsFilesComeFromAnotherWorker(t *testing.T) {
	t.Parallel()
	dest := t.TempDir()
	r := newRig(t, t.TempDir(), clientOf(t, filesync.NewFSSyncTarget(filesync.WithFSSyncDirDelete(0, dest))), treeExport(false), parts(2)...)
	ctx, lose := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { first <- sendFiles(ctx, r.workers[0], aTree("lost")) }()
	listed := func() int {
		tree := r.captures[0].(*tree)
		tree.mu.Lock()
		defer tree.mu.Unlock()
		return tree.listed
	}
	for listed() == 0 {
		runtime.Gosched()
	}
	lose()
	if err := <-first; err == nil {
		t.Error("the lost worker's export succeeded")
	}
	for listed() == 1 {
		runtime.Gosched()
	}
	errs := r.each(func(leg int, w worker) error { return sendFiles(t.Context(), w, aTree([]string{"a", "b"}[leg])) })
	wantNone(t, errs...)
	got := slices.Sorted(maps.Keys(onDisk(t, dest)))
	if !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("the client has %q", got)
	}
}

// packets opens a worker's call and sends it packets.
func packets(t *testing.T, w worker, ps ...*types.Packet) filesync.FileSend_DiffCopyClient {
	t.Helper()
	ctx := metadata.AppendToOutgoingContext(t.Context(), exporterID, "0", "buildkit-exporter-multi-platform", "1")
	stream, err := filesync.NewFileSendClient(w.conn).DiffCopy(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		if err := stream.SendMsg(p); err != nil {
			t.Fatal(err)
		}
	}
	return stream
}

func TestTree_WorkersThatDoNotKeepToTheProtocolAreRefused(t *testing.T) {
	t.Parallel()
	file := &types.Packet{Type: types.PACKET_STAT, Stat: &types.Stat{Path: "f", Mode: 0o644, Size: 1}}
	end := &types.Packet{Type: types.PACKET_STAT}
	for name, test := range map[string]struct {
		sends []*types.Packet
		code  codes.Code
	}{
		"contents before the list": {[]*types.Packet{{Type: types.PACKET_DATA, ID: 0, Data: []byte("x")}}, codes.InvalidArgument},
		"contents of no file":      {[]*types.Packet{file, end, {Type: types.PACKET_DATA, ID: 5, Data: []byte("x")}}, codes.InvalidArgument},
		"an error":                 {[]*types.Packet{file, {Type: types.PACKET_ERR, Data: []byte("layer is gone")}}, codes.Unknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, t.TempDir(), clientOf(t, filesync.NewFSSyncTarget(filesync.WithFSSyncDirDelete(0, t.TempDir()))), treeExport(false), parts(1)...)
			stream := packets(t, r.workers[0], test.sends...)
			for {
				var p types.Packet
				if err := stream.RecvMsg(&p); err != nil {
					if status.Code(err) != test.code {
						t.Errorf("got %v", err)
					}
					return
				}
			}
		})
	}
}
