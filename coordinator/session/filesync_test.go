package session_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	bksession "github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/session/spool"
)

// mib is enough for several chunks, and for a client not to have sent all before
// something else happens.
const mib = 1 << 20

// source is a client's folder, which counts what is read of it.
type source struct {
	fsutil.FS
	dir  string
	read atomic.Int64
	// onRead, if any, is called before each read of a file, with what was read of it.
	onRead func(path string, off int64)
}

func (s *source) Open(path string) (io.ReadCloser, error) {
	f, err := s.FS.Open(path)
	if err != nil {
		return nil, err
	}
	return &counted{ReadCloser: f, of: s, path: path}, nil
}

type counted struct {
	io.ReadCloser
	of   *source
	path string
	off  int64
}

func (c *counted) Read(p []byte) (int, error) {
	if c.of.onRead != nil {
		c.of.onRead(c.path, c.off)
	}
	n, err := c.ReadCloser.Read(p)
	c.off += int64(n)
	c.of.read.Add(int64(n))
	return n, err
}

func newSource(t failer, dir string, files map[string][]byte) *source {
	t.Helper()
	for name, content := range files {
		write(t, filepath.Join(dir, name), content)
	}
	fs, err := fsutil.NewFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	return &source{FS: fs, dir: dir}
}

// failer is a test or a check of rapid.
type failer interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func write(t failer, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func total(files map[string][]byte) (n int64) {
	for content := range maps.Values(files) {
		n += int64(len(content))
	}
	return n
}

// random makes a content that compresses to nothing else.
func random(n int) []byte {
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	out := make([]byte, n)
	_, _ = r.Read(out)
	return out
}

func wantFiles(t failer, dir string, files map[string][]byte) {
	t.Helper()
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: %d bytes that are not the %d of the client; %v", name, len(got), len(want), err)
		}
	}
}

func newSpool(t *testing.T, limit int64) *spool.Spool {
	t.Helper()
	s, err := spool.New(filepath.Join(t.TempDir(), "spool"), limit)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// rig is a client with one folder, and workers that have its session.
type rig struct {
	*farm
	spool   *spool.Spool
	source  *source
	end     func() // of the client
	callers []bksession.Caller
}

func newRig(t *testing.T, contexts *spool.Spool, workers int, files map[string][]byte) *rig {
	t.Helper()
	r := &rig{farm: newFarmWith(t, contexts), spool: contexts, source: newSource(t, t.TempDir(), files)}
	s, end := r.client(t, filesync.NewFSSyncProvider(filesync.StaticDirSource{"context": r.source}))
	r.end = end
	for i := range workers {
		w := newWorker(t, fmt.Sprint("worker ", i))
		r.expose(t, w, s.ID())
		r.callers = append(r.callers, w.caller(t, s.ID()))
	}
	r.relays.Share(s.ID())
	return r
}

func (r *rig) sync(ctx context.Context, worker int, dest string, patterns ...string) error {
	return filesync.FSSync(ctx, r.callers[worker], filesync.FSSendRequestOpt{Name: "context", DestDir: dest, IncludePatterns: patterns})
}

// all syncs to every worker at once.
func (r *rig) all(t *testing.T, files map[string][]byte) {
	t.Helper()
	var running sync.WaitGroup
	for i := range r.callers {
		running.Go(func() {
			dest := t.TempDir()
			if err := r.sync(t.Context(), i, dest); err != nil {
				t.Errorf("worker %d: %v", i, err)
				return
			}
			wantFiles(t, dest, files)
		})
	}
	running.Wait()
}

func tree(n int) map[string][]byte {
	files := map[string][]byte{"large": random(5*mib + 1), "empty": {}, "one": {1}}
	for i := range n {
		files[fmt.Sprintf("dir%d/file%d", i%7, i)] = random(i * 37 % 5000)
	}
	return files
}

func TestFileSync_EachFileLeavesTheClientOnce(t *testing.T) {
	t.Parallel()
	files := tree(1000)
	r := newRig(t, newSpool(t, spool.DefaultLimit), 4, files)
	r.all(t, files)
	if got := r.source.read.Load(); got != total(files) {
		t.Errorf("the client sent %d bytes of %d", got, total(files))
	}
	r.all(t, files) // late legs
	if got := r.source.read.Load(); got != total(files) {
		t.Errorf("with late legs, the client sent %d bytes of %d", got, total(files))
	}
	r.end()
	waitEmpty(t, r.spool)
}

// waitEmpty waits for what a session's end brings about.
func waitEmpty(t *testing.T, s *spool.Spool) {
	t.Helper()
	eventually(t, "the spool is empty", func() bool { return s.Used() == 0 })
}

func TestFileSync_WithoutASpoolEveryWorkerAsksTheClient(t *testing.T) {
	t.Parallel()
	files := tree(10)
	r := newRig(t, nil, 2, files)
	r.all(t, files)
	if got := r.source.read.Load(); got != 2*total(files) {
		t.Errorf("the client sent %d bytes of %d", got, total(files))
	}
}

func TestFileSync_OneWorkerNeedsNoSpool(t *testing.T) {
	t.Parallel()
	files := tree(10)
	s := newSpool(t, spool.DefaultLimit)
	f := newFarmWith(t, s)
	src := newSource(t, t.TempDir(), files)
	src.onRead = func(string, int64) {
		if s.Used() > 0 {
			t.Error("something is spooled")
		}
	}
	client, _ := f.client(t, filesync.NewFSSyncProvider(filesync.StaticDirSource{"context": src}))
	w := newWorker(t, "w")
	f.expose(t, w, client.ID())
	dest := t.TempDir()
	if err := filesync.FSSync(t.Context(), w.caller(t, client.ID()), filesync.FSSendRequestOpt{Name: "context", DestDir: dest}); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dest, files)
	if s.Used() > 0 {
		t.Error("something is spooled")
	}
}

func TestFileSync_WhereTheSpoolHasNoSpaceTheClientSendsAgain(t *testing.T) {
	t.Parallel()
	files := tree(50)
	for name, limit := range map[string]int64{"for anything": 1, "for the large file": mib} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, newSpool(t, limit), 3, files)
			r.all(t, files)
			if used := r.spool.Used(); used > limit {
				t.Errorf("%d bytes are used", used)
			}
		})
	}
	t.Run("because the disk fails", func(t *testing.T) {
		t.Parallel()
		dir := filepath.Join(t.TempDir(), "spool")
		s, err := spool.New(dir, spool.DefaultLimit)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		newRig(t, s, 3, files).all(t, files)
	})
}

func TestFileSync_OnlyWhatHasChangedIsSentAgain(t *testing.T) {
	t.Parallel()
	files := tree(50)
	r := newRig(t, newSpool(t, spool.DefaultLimit), 2, files)
	dests := []string{t.TempDir(), t.TempDir()}
	for i, dest := range dests {
		if err := r.sync(t.Context(), i, dest); err != nil {
			t.Fatal(err)
		}
	}
	before := r.source.read.Load()
	files["one"] = random(3000)
	write(t, filepath.Join(r.source.dir, "one"), files["one"])
	for i, dest := range dests {
		if err := r.sync(t.Context(), i, dest); err != nil {
			t.Fatal(err)
		}
		wantFiles(t, dest, files)
	}
	if got := r.source.read.Load() - before; got != 3000 {
		t.Errorf("the client sent %d bytes", got)
	}
}

// rawCall is a worker's call of DiffCopy, to play one that is not BuildKit's.
func (r *rig) rawCall(ctx context.Context, t *testing.T, worker int) filesync.FileSync_DiffCopyClient {
	t.Helper()
	ctx = metadata.AppendToOutgoingContext(ctx, "dir-name", "context")
	stream, err := filesync.NewFileSyncClient(r.callers[worker].Conn()).DiffCopy(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// ask waits for a file to be listed, asks for it, and returns its first data.
func ask(t *testing.T, stream filesync.FileSync_DiffCopyClient, path string) []byte {
	t.Helper()
	for id := uint32(0); ; id++ {
		p, err := stream.Recv()
		if err != nil || p.Type != types.PACKET_STAT || p.Stat == nil {
			t.Fatalf("%s is not listed: %v, %v", path, p, err)
		}
		if p.Stat.Path == path {
			if err := stream.Send(&types.Packet{Type: types.PACKET_REQ, ID: id}); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	for {
		p, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if p.Type == types.PACKET_DATA {
			return p.Data
		}
	}
}

func TestFileSync_AStalledFetcherStallsNobody(t *testing.T) {
	t.Parallel()
	files := map[string][]byte{"a": random(64 * mib)}
	r := newRig(t, newSpool(t, spool.DefaultLimit), 2, files)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if first := ask(t, r.rawCall(ctx, t, 0), "a"); !bytes.HasPrefix(files["a"], first) { // it takes this, and no more
		t.Error("the file came out changed")
	}
	dest := t.TempDir()
	if err := r.sync(t.Context(), 1, dest); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dest, files)
	if got := r.source.read.Load(); got != total(files) {
		t.Errorf("the client sent %d bytes of %d", got, total(files))
	}
}

// TestFileSync_AFetcherThatTakesNothingIsReplaced has a worker take nothing of a file that is its own, until there is no
// room for more, while the client sends it one that another waits for.
func TestFileSync_AFetcherThatTakesNothingIsReplaced(t *testing.T) {
	t.Parallel()
	files := map[string][]byte{"own": random(64 * mib), "shared": random(2 * mib)}
	r := newRig(t, newSpool(t, 3*mib), 2, files)
	goOn := make(chan struct{})
	var first atomic.Bool
	r.source.onRead = func(path string, off int64) {
		if path == "shared" && off == mib && !first.Swap(true) {
			<-goOn
		}
	}
	slow := r.rawCall(t.Context(), t, 0)
	for range 2 {
		if p, err := slow.Recv(); err != nil || p.Stat == nil {
			t.Fatal(p, err)
		}
	}
	for _, id := range []uint32{1, 0} {
		if err := slow.Send(&types.Packet{Type: types.PACKET_REQ, ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the slow worker's file is coming", func() bool { return r.source.read.Load() > 4*mib })
	dest := t.TempDir()
	if err := r.sync(t.Context(), 1, dest, "shared"); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dest, map[string][]byte{"shared": files["shared"]})
	close(goOn)
	got, ends := map[uint32][]byte{}, 0
	for ends < 2 {
		p, err := slow.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if p.Type == types.PACKET_DATA && len(p.Data) == 0 {
			ends++
		}
		got[p.ID] = append(got[p.ID], p.Data...)
	}
	if !bytes.Equal(got[0], files["own"]) || !bytes.Equal(got[1], files["shared"]) {
		t.Error("the slow worker got something else")
	}
}

func TestFileSync_AFetcherThatGoesIsReplaced(t *testing.T) {
	t.Parallel()
	files := map[string][]byte{"a": random(16 * mib)}
	r := newRig(t, newSpool(t, spool.DefaultLimit), 3, files)
	half, goOn := make(chan struct{}), make(chan struct{})
	r.source.onRead = func(_ string, off int64) {
		if off == 8*mib {
			select {
			case half <- struct{}{}:
				<-goOn
			case <-goOn:
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ask(t, r.rawCall(ctx, t, 0), "a")
	await(t, "half of the file has been sent", half)
	var running sync.WaitGroup
	followed := make(chan struct{}, 2)
	for i := range 2 {
		running.Go(func() {
			dest := t.TempDir()
			err := filesync.FSSync(t.Context(), r.callers[1+i], filesync.FSSendRequestOpt{Name: "context", DestDir: dest, ProgressCb: func(n int, _ bool) {
				if n > 4*mib {
					select {
					case followed <- struct{}{}:
					default:
					}
				}
			}})
			if err != nil {
				t.Error(err)
				return
			}
			wantFiles(t, dest, files)
		})
	}
	await(t, "another has some of it", followed)
	cancel()
	close(goOn)
	running.Wait()
	if got := r.source.read.Load(); got > total(files)*2 {
		t.Errorf("the client sent %d bytes of %d", got, total(files))
	}
}

func TestFileSync_AFileThatIsNotAsListedIsNotShared(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int{"longer": 3*mib + 5, "shorter": mib + 5, "nothing left": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const listed = 2*mib + 7
			content := random(3*mib + 5)
			r := newRig(t, newSpool(t, spool.DefaultLimit), 3, map[string][]byte{"a": content[:listed]})
			var once sync.Once
			r.source.onRead = func(string, int64) {
				once.Do(func() { write(t, filepath.Join(r.source.dir, "a"), content[:size]) })
			}
			r.all(t, map[string][]byte{"a": content[:size]})
		})
	}
}

func TestFileSync_AFileThatChangesUnderAFollowerIsAnError(t *testing.T) {
	t.Parallel()
	old, changed := random(4*mib), random(4*mib+0)
	changed[100] ^= 1
	r := newRig(t, newSpool(t, spool.DefaultLimit), 2, map[string][]byte{"a": old})
	info, err := os.Stat(filepath.Join(r.source.dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	half, goOn := make(chan struct{}), make(chan struct{})
	r.source.onRead = func(_ string, off int64) {
		if off == 2*mib {
			select {
			case half <- struct{}{}:
				<-goOn
			case <-goOn:
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ask(t, r.rawCall(ctx, t, 0), "a")
	await(t, "half of the file has been sent", half)
	followed, result := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		result <- filesync.FSSync(t.Context(), r.callers[1], filesync.FSSendRequestOpt{Name: "context", DestDir: t.TempDir(), ProgressCb: func(n int, _ bool) {
			if n > mib {
				select {
				case followed <- struct{}{}:
				default:
				}
			}
		}})
	}()
	await(t, "another has some of it", followed)
	write(t, filepath.Join(r.source.dir, "a"), changed)
	if err := os.Chtimes(filepath.Join(r.source.dir, "a"), info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	cancel()
	close(goOn)
	if err := <-result; status.Code(err) != codes.Aborted {
		t.Errorf("got %v", err)
	}
}

func TestFileSync_ErrorsPass(t *testing.T) {
	t.Parallel()
	r := newRig(t, newSpool(t, spool.DefaultLimit), 2, tree(5))
	t.Run("a folder that the client does not have", func(t *testing.T) {
		t.Parallel()
		err := filesync.FSSync(t.Context(), r.callers[0], filesync.FSSendRequestOpt{Name: "other", DestDir: t.TempDir()})
		if status.Code(err) != codes.NotFound {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a worker that gives up", func(t *testing.T) {
		t.Parallel()
		stream := r.rawCall(t.Context(), t, 0)
		ask(t, stream, "large")
		if err := stream.Send(&types.Packet{Type: types.PACKET_ERR, Data: []byte("no space left")}); err != nil {
			t.Fatal(err)
		}
		for {
			p, err := stream.Recv()
			if err != nil {
				if status.Code(err) != codes.Unknown || p != nil && p.Type == types.PACKET_FIN {
					t.Errorf("got %v", err)
				}
				return
			}
		}
	})
	t.Run("a worker that asks twice", func(t *testing.T) {
		t.Parallel()
		stream := r.rawCall(t.Context(), t, 1)
		ask(t, stream, "large")
		for id := range uint32(20) {
			if err := stream.Send(&types.Packet{Type: types.PACKET_REQ, ID: id}); err != nil {
				break
			}
		}
		for {
			if _, err := stream.Recv(); err != nil {
				if errors.Is(err, io.EOF) {
					t.Error("it ended well")
				}
				return
			}
		}
	})
}

// TestFileSync_PropertyEveryWorkerGetsTheClientsFiles has workers come at different
// times, want different parts, and go.
func TestFileSync_PropertyEveryWorkerGetsTheClientsFiles(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		files := map[string][]byte{}
		for i, size := range rapid.SliceOfN(rapid.OneOf(rapid.IntRange(0, 300), rapid.IntRange(30_000, 40_000), rapid.IntRange(mib, 2*mib)), 1, 30).Draw(rt, "sizes") {
			files[fmt.Sprintf("%c/%d", 'a'+i%3, i)] = random(size)
		}
		limit := rapid.SampledFrom([]int64{1, 50_000, 3 * mib, spool.DefaultLimit}).Draw(rt, "limit")
		workers := rapid.IntRange(2, 4).Draw(rt, "workers")
		r := newRig(t, newSpool(t, limit), workers, files)
		var sent atomic.Int64 // reads of the client, on which the rest depends
		starts := rapid.SliceOfN(rapid.Int64Range(0, 40), workers, workers).Draw(rt, "starts")
		dies := rapid.IntRange(-1, workers-1).Draw(rt, "dies")
		death := rapid.Int64Range(1, 60).Draw(rt, "death")
		parts := rapid.SliceOfN(rapid.SampledFrom([][]string{nil, {"a"}, {"a", "b"}, {"c/2"}}), workers, workers).Draw(rt, "parts")
		starts[0] = 0
		begin := make([]chan struct{}, workers)
		for i := range begin {
			begin[i] = make(chan struct{})
		}
		ctx, kill := context.WithCancel(t.Context())
		defer kill()
		var mu sync.Mutex
		step := func(n int64) {
			mu.Lock()
			defer mu.Unlock()
			for i, at := range starts {
				if at >= 0 && at <= n {
					starts[i] = -1
					close(begin[i])
				}
			}
			if n >= death {
				kill()
			}
		}
		r.source.onRead = func(string, int64) { step(sent.Add(1)) }
		step(0)
		var running sync.WaitGroup
		for i := range workers {
			running.Go(func() {
				if i == 0 {
					defer step(1 << 40) // late ones come now
				}
				<-begin[i]
				dest := t.TempDir()
				workerCtx := t.Context()
				if i == dies {
					workerCtx = ctx
				}
				err := r.sync(workerCtx, i, dest, parts[i]...)
				if i == dies && err != nil {
					return
				}
				if err != nil {
					rt.Errorf("worker %d: %v", i, err)
					return
				}
				wantFiles(rt, dest, matching(files, parts[i]))
			})
		}
		running.Wait()
		union := map[string][]byte{}
		for _, part := range parts {
			maps.Copy(union, matching(files, part))
		}
		if got, most := r.source.read.Load(), total(union); dies < 0 && limit == spool.DefaultLimit && got != most {
			rt.Errorf("the client sent %d bytes of %d", got, most)
		} else if dies >= 0 && limit == spool.DefaultLimit && got > 2*most {
			rt.Errorf("the client sent %d bytes of %d, although only one worker went", got, most)
		}
		if used := r.spool.Used(); used > limit {
			rt.Errorf("%d bytes are used of %d", used, limit)
		}
		r.end()
		waitEmpty(t, r.spool)
	})
}

// matching are the files that include patterns select.
func matching(files map[string][]byte, patterns []string) map[string][]byte {
	out := map[string][]byte{}
	for name, content := range files {
		for _, p := range patterns {
			if name == p || filepath.Dir(name) == p {
				out[name] = content
			}
		}
		if patterns == nil {
			out[name] = content
		}
	}
	return out
}
