package fleet_test

import (
	"fmt"
	"io"
	"maps"
	"net"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func workerCertificate(name, pool string) identity.Identity {
	return identity.Identity{Kind: identity.Worker, Name: name, Pools: []string{pool}}
}

func TestFleet_ACertificateBindsNameAndPool(t *testing.T) {
	mac := workerCertificate("mac-2", "office")
	for name, c := range map[string]struct {
		as         identity.Identity
		name, pool string
		want       codes.Code
		in         string // the pool that it ends up in
	}{
		"its own":                         {mac, "mac-2", "", codes.OK, "office"},
		"its own, said so":                {mac, "mac-2", "office", codes.OK, "office"},
		"another's name":                  {mac, "mac-3", "", codes.PermissionDenied, ""},
		"a name that begins alike":        {mac, "mac-22", "", codes.PermissionDenied, ""},
		"a name in other letters":         {mac, "MAC-2", "", codes.PermissionDenied, ""},
		"another pool":                    {mac, "mac-2", "cloud", codes.PermissionDenied, ""},
		"the default pool":                {mac, "mac-2", "default", codes.PermissionDenied, ""},
		"a worker of no pool":             {identity.Identity{Kind: identity.Worker, Name: "mac-2"}, "mac-2", "", codes.PermissionDenied, ""},
		"a client":                        {identity.Identity{Kind: identity.Client, Name: "mac-2", Tenant: "acme", Pools: []string{"office"}}, "mac-2", "office", codes.PermissionDenied, ""},
		"an administrator":                {identity.Identity{Kind: identity.Admin, Name: "mac-2", Tenant: "default"}, "mac-2", "", codes.PermissionDenied, ""},
		"a coordinator":                   {identity.Identity{Kind: identity.Coordinator, Name: "mac-2"}, "mac-2", "", codes.PermissionDenied, ""},
		"nobody":                          {identity.Identity{Kind: identity.Anonymous}, "mac-2", "", codes.PermissionDenied, ""},
		"a kind of the future":            {identity.Identity{Kind: "auditor", Name: "mac-2"}, "mac-2", "", codes.PermissionDenied, ""},
		"this machine":                    {identity.Identity{}, "mac-2", "", codes.OK, "default"},
		"this machine's socket":           {identity.Identity{Socket: true}, "mac-2", "cloud", codes.OK, "cloud"},
		"this machine, with a bad pool":   {identity.Identity{}, "mac-2", "../cloud", codes.InvalidArgument, ""},
		"this machine, with a long pool":  {identity.Identity{}, "mac-2", strings.Repeat("p", 129), codes.InvalidArgument, ""},
		"this machine, with a pool's two": {identity.Identity{}, "mac-2", "a,b", codes.InvalidArgument, ""},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				f.as = c.as
				h := hello(c.name)
				h.Pool = c.pool
				_, _, err := f.knock(t, &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: h}})
				if status.Code(err) != c.want {
					t.Errorf("got %v", err)
				}
				synctest.Wait()
				w, attached := f.Worker(c.name)
				if attached != (c.want == codes.OK) {
					t.Errorf("attached: %t", attached)
				}
				if attached && w.Pool != c.in {
					t.Errorf("in the pool %s", w.Pool)
				}
			})
		})
	}
}

func TestFleet_BoundsLabels(t *testing.T) {
	many := func(n int) map[string]string {
		out := map[string]string{}
		for i := range n {
			out[fmt.Sprint(i)] = ""
		}
		return out
	}
	for name, c := range map[string]struct {
		labels map[string]string
		ok     bool
	}{
		"some":                     {map[string]string{"zone": "office", "rack": "№ 7, left", "example.com/owner": ""}, true},
		"as many as possible":      {many(32), true},
		"one more":                 {many(33), false},
		"the longest":              {map[string]string{strings.Repeat("k", 63): strings.Repeat("ü", 256)}, true},
		"a longer key":             {map[string]string{strings.Repeat("k", 64): ""}, false},
		"a longer value":           {map[string]string{"k": strings.Repeat("v", 257)}, false},
		"no key":                   {map[string]string{"": "v"}, false},
		"a key with a space":       {map[string]string{"a b": "v"}, false},
		"a key that cannot be had": {map[string]string{"a=b": "v"}, false},
		"a key with an escape":     {map[string]string{"\x1b[2J": "v"}, false},
		"a value with an escape":   {map[string]string{"k": "\x1b[2J"}, false},
		"a value of two lines":     {map[string]string{"k": "a\nb"}, false},
		"a value that turns text":  {map[string]string{"k": "a\u202eb"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				h := hello("amd-1")
				h.Labels = c.labels
				_, _, err := f.knock(t, &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: h}})
				synctest.Wait()
				if w, attached := f.Worker("amd-1"); attached != c.ok || attached && !maps.Equal(w.Labels, c.labels) {
					t.Errorf("attached: %t, %v", attached, err)
				}
				if !c.ok && status.Code(err) != codes.InvalidArgument {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

// certified is a connection that came with a certificate.
type certified struct {
	net.Conn
	who identity.Identity
}

func (c certified) Identity() identity.Identity { return c.who }

// refusedBack dials a connection back, and tells whether it was closed for that.
func refusedBack(f *farm, id string, who identity.Identity) bool {
	theirs, ours := net.Pipe()
	if who.Kind == identity.Local {
		f.Accept(id, theirs)
	} else {
		f.Accept(id, certified{theirs, who})
	}
	synctest.Wait()
	ended := make(chan error, 1)
	go func() {
		_, err := ours.Read(make([]byte, 1)) // what is taken says something first: HTTP/2's preface
		ended <- err
	}()
	synctest.Wait()
	select {
	case err := <-ended:
		_ = ours.Close()
		return err == io.EOF //nolint:errorlint // the pipe's very own
	default:
		_ = ours.Close()
		return false
	}
}

func TestFleet_AcceptsBackOnlyWhomItAsked(t *testing.T) {
	for name, c := range map[string]struct {
		asked identity.Identity
		wrong []identity.Identity
	}{
		"a worker's certificate": {
			asked: workerCertificate("amd-1", "office"),
			wrong: []identity.Identity{
				{}, {Kind: identity.Anonymous}, workerCertificate("amd-2", "office"), {Kind: identity.Client, Name: "amd-1", Tenant: "default"},
				{Kind: identity.Admin, Name: "amd-1", Tenant: "default"}, {Kind: identity.Coordinator, Name: "amd-1"},
			},
		},
		"this machine": {
			wrong: []identity.Identity{workerCertificate("amd-1", "default"), {Kind: identity.Anonymous}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				f.as = c.asked
				a, w := f.attach(t, "amd-1")
				call := begin(t.Context(), w.Take)
				id := (<-a.opens).GetConnectionId()
				for _, who := range c.wrong {
					if !refusedBack(f, id, who) {
						t.Errorf("a connection of %s was taken", who)
					}
				}
				if !refusedBack(f, "guessed", c.asked) {
					t.Error("a connection that nobody asked for was taken")
				}
				if err := call.result(t); err.Error() != "still waiting" {
					t.Fatalf("the wrong connections ended the waiting: %v", err)
				}
				if refusedBack(f, id, c.asked) {
					t.Error("the right connection was refused")
				}
				if err := call.result(t); err != nil {
					t.Fatal(err)
				}
				_ = call.conn.Close()
				if !refusedBack(f, id, c.asked) {
					t.Error("an id was good twice")
				}
			})
		})
	}
}
