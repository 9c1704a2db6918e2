package contexts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/archfarm/archfarm/contextpack"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// rig is a coordinator's contexts behind gRPC, on a real store.
type rig struct {
	*Contexts
	store store.Store
	blobs string // the folder of them
	dir   string
	// breakAfter, unless zero, is after how many bytes each connection breaks.
	breakAfter  atomic.Int64
	connections atomic.Int64
	listener    *bufconn.Listener
}

func newRig(t *testing.T, o Options) *rig {
	t.Helper()
	r := &rig{blobs: filepath.Join(t.TempDir(), "blobs"), dir: filepath.Join(t.TempDir(), "contexts"), listener: bufconn.Listen(1 << 20)}
	var err error
	r.store, err = sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(t.TempDir(), "state.db"), BlobDir: r.blobs})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.store.Close(); err != nil {
			t.Error(err)
		}
	})
	if r.Contexts, err = New(r.store, r.dir, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(16<<20),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			return next(withTenant(ctx), req)
		}),
		grpc.StreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, tenantStream{s})
		}))
	archfarmv1.RegisterJobServiceServer(server, jobs{Contexts: r.Contexts})
	done := make(chan struct{})
	go func() { // until the server stops
		defer close(done)
		_ = server.Serve(r.listener)
	}()
	t.Cleanup(func() { server.Stop(); <-done })
	return r
}

// jobs is as the job service embeds contexts.
type jobs struct {
	archfarmv1.UnimplementedJobServiceServer
	*Contexts
}

func (j jobs) FindMissing(ctx context.Context, r *archfarmv1.FindMissingRequest) (*archfarmv1.FindMissingResponse, error) {
	return j.Contexts.FindMissing(ctx, r)
}

func (j jobs) UploadContext(s grpc.ClientStreamingServer[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse]) error {
	return j.Contexts.UploadContext(s)
}

type tenantStream struct{ grpc.ServerStream }

func (s tenantStream) Context() context.Context { return withTenant(s.ServerStream.Context()) }

func withTenant(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	if t := md.Get("tenant"); len(t) > 0 {
		return identity.NewContext(ctx, identity.Identity{Kind: identity.Client, Name: "ci", Tenant: t[0]})
	}
	return ctx
}

func as(t *testing.T, tenant string) context.Context {
	return metadata.AppendToOutgoingContext(t.Context(), "tenant", tenant)
}

func (r *rig) client(t *testing.T) archfarmv1.JobServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///farm", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := r.listener.DialContext(ctx)
			if err != nil {
				return nil, err
			}
			r.connections.Add(1)
			return &fragile{Conn: c, rig: r}, nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return archfarmv1.NewJobServiceClient(conn)
}

// fragile breaks after the rig's number of bytes.
type fragile struct {
	net.Conn
	rig     *rig
	written atomic.Int64
}

func (f *fragile) Write(p []byte) (int, error) {
	if after := f.rig.breakAfter.Load(); after > 0 && f.written.Add(int64(len(p))) > after {
		f.Close()
		return 0, errors.New("the connection broke")
	}
	return f.Conn.Write(p)
}

func bytesOf(seed byte, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// project is a folder with a big file and some small ones; seed makes it different.
func project(t *testing.T, seed byte) string {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, "Dockerfile", []byte("FROM scratch"))
	write(t, dir, "big", bytesOf(seed, 9<<20))
	for i := range 20 {
		write(t, dir, fmt.Sprintf("src%d/file", i), bytesOf(seed+byte(i)+1, 50_000))
	}
	return dir
}

func write(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

func source(t *testing.T, dir string) *contextpack.Source {
	t.Helper()
	s, err := contextpack.Folder(dir, contextpack.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// upload sends a folder for a tenant.
func (r *rig) upload(t *testing.T, tenant, dir string) (string, contextpack.Stats) {
	t.Helper()
	d, stats, err := contextpack.Upload(as(t, tenant), r.client(t), source(t, dir), nil)
	if err != nil {
		t.Fatal(err)
	}
	return d, stats
}

// grow makes all blobs older.
func (r *rig) grow(t *testing.T, age time.Duration) {
	t.Helper()
	r.everyBlob(t, func(p string, info fs.FileInfo) {
		at := info.ModTime().Add(-age)
		if err := os.Chtimes(p, at, at); err != nil {
			t.Fatal(err)
		}
	})
}

func (r *rig) countBlobs(t *testing.T) (n int) {
	t.Helper()
	r.everyBlob(t, func(string, fs.FileInfo) { n++ })
	return n
}

func (r *rig) everyBlob(t *testing.T, do func(p string, info fs.FileInfo)) {
	t.Helper()
	err := filepath.WalkDir(r.blobs, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			do(p, info)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
