package publish

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/session"
	"google.golang.org/grpc/codes"
)

// inMemory hands requests to a handler without a network, so that time can be
// the test's own.
type inMemory struct{ http.Handler }

func (m inMemory) RoundTrip(r *http.Request) (*http.Response, error) {
	recorder := httptest.NewRecorder()
	m.ServeHTTP(recorder, r)
	response := recorder.Result()
	response.Request = r
	return response, nil
}

type failing struct{ err error }

func (f failing) RoundTrip(*http.Request) (*http.Response, error) { return nil, f.err }

// Not parallel: it replaces the package's connections.
func TestPush_RegistryThatFailsIsTriedAgainButNotForever(t *testing.T) {
	real := secureHosts
	defer func() { secureHosts = real }()
	through := func(transport http.RoundTripper) {
		secureHosts = docker.ConfigureDefaultRegistries(docker.WithClient(&http.Client{Transport: transport}))
	}
	push := func(t *testing.T) (time.Duration, error) {
		sessions, err := session.NewManager() // without a session: nobody is asked for a password
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		err = Registry{Sessions: sessions, Session: identity.NewID()}.Push(t.Context(), "registry.example/app:v1", false, index("x"))
		return time.Since(start), err
	}
	failures := func(n int) (*registry, *int) {
		seen := new(int)
		return &registry{answer: func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method != http.MethodPut || *seen >= n {
				return false
			}
			*seen++
			_, _ = io.Copy(io.Discard, r.Body)
			refuse(w, http.StatusServiceUnavailable, "UNAVAILABLE", "on fire")
			return true
		}}, seen
	}
	t.Run("it recovers", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, _ := failures(2)
			through(inMemory{g})
			if _, err := push(t); err != nil {
				t.Fatal(err)
			}
			if blob, _ := g.holds("app/v1"); blob == nil {
				t.Error("nothing arrived")
			}
		})
	})
	t.Run("it does not", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, seen := failures(1000)
			through(inMemory{g})
			took, err := push(t)
			wantStatus(t, err, codes.Unavailable, "registry.example/app:v1", "on fire")
			if *seen < 2 || *seen > 10 || took > time.Minute {
				t.Errorf("tried %d times in %s", *seen, took)
			}
		})
	})
	t.Run("it cannot be reached", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			through(failing{&net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}})
			took, err := push(t)
			wantStatus(t, err, codes.Unavailable, "registry.example/app:v1", "connection refused")
			if took > time.Minute {
				t.Errorf("tried for %s", took)
			}
		})
	})
	t.Run("it has had enough", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			through(inMemory{http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				refuse(w, http.StatusTooManyRequests, "TOOMANYREQUESTS", "slow down")
			})})
			took, err := push(t)
			wantStatus(t, err, codes.Unavailable, "slow down")
			if took > time.Minute {
				t.Errorf("tried for %s", took)
			}
		})
	})
	t.Run("it makes the client wait too long", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			through(failing{context.DeadlineExceeded})
			_, err := push(t)
			wantStatus(t, err, codes.DeadlineExceeded, "registry.example/app:v1")
		})
	})
}
