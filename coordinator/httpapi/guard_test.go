package httpapi

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// A body that stops half way, and its connection's use by another request.
func TestPaced_ABodyThatStopsIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	for _, h2 := range []bool{false, true} {
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.Body = &paced{ReadCloser: r.Body, control: http.NewResponseController(w), within: 50 * time.Millisecond}
			if _, err := io.ReadAll(r.Body); err != nil {
				fail(w, tooLarge(r, err))
			}
		}))
		server.EnableHTTP2 = h2
		server.StartTLS()
		send := func(body io.Reader) (proto, code int) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, body)
			if err != nil {
				t.Fatal(err)
			}
			response, err := server.Client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = response.Body.Close()
			return response.ProtoMajor, response.StatusCode
		}
		half, sender := io.Pipe()
		go func() { _, _ = sender.Write([]byte("half")) }() // ends with the request
		if proto, code := send(half); code != http.StatusRequestTimeout || proto == 2 != h2 {
			t.Errorf("HTTP/2 %t: answered %d over HTTP/%d", h2, code, proto)
		}
		_ = half.Close()
		if _, code := send(strings.NewReader("whole")); code != http.StatusOK {
			t.Errorf("HTTP/2 %t: the next was answered %d", h2, code)
		}
		server.Close()
	}
}

func TestLoopback(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]bool{
		"localhost": true, "LOCALHOST:80": true, "a.localhost": true, "127.0.0.1:8373": true, "[::1]": true, "[::1]:80": true,
		"": false, "localhost.evil.example": false, "notlocalhost": false, "127.0.0.1.evil.example": false, "10.0.0.1": false, "0.0.0.0": false, "evil.example:80": false,
	} {
		if loopback(host) != want {
			t.Errorf("%q: want %t", host, want)
		}
	}
}
