package httpapi

import (
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxSubmit bounds a job with its secrets, maxBody everything else in JSON.
	maxSubmit = 8 << 20
	maxBody   = 1 << 20
	// bodyWithin is how long a body in JSON may take, patience how long an archive may
	// pause, and how long a client may take nothing of an answer.
	bodyWithin = time.Minute
	patience   = 30 * time.Second
)

// body is what a request may carry. Both are types that no page of another site can
// have a browser send without asking first (Fetch standard, "CORS-safelisted
// request-header").
type body int

const (
	bodyJSON body = iota
	bodyArchive
)

func (b body) types() []string {
	if b == bodyArchive {
		return []string{"application/x-tar", "application/tar", "application/gzip", "application/x-gzip", "application/zstd", "application/x-bzip2", "application/octet-stream"}
	}
	return []string{"application/json"}
}

// guard refuses what comes from other sites' pages, and bodies that are too large,
// too slow or of another type. It counts.
func (a *api) guard(next http.Handler, of body) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out := &response{ResponseWriter: w, control: http.NewResponseController(w), route: "other", code: http.StatusOK}
		defer func() { a.requests.WithLabelValues(method(r), out.route, strconv.Itoa(out.code)).Inc() }()
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		limit := a.limit(r, of)
		if err := errors.Join(fromElsewhere(r), of.check(r, limit)); err != nil {
			fail(out, err)
			return
		}
		if r.Body != nil && r.Body != http.NoBody {
			paced := &paced{ReadCloser: http.MaxBytesReader(w, r.Body, limit), control: out.control, within: bodyWithin}
			if of == bodyArchive {
				paced.within, paced.each = patience, true
			}
			r.Body = paced
		}
		next.ServeHTTP(out, r)
	})
}

// method bounds the metric's labels.
func method(r *http.Request) string {
	if slices.Contains([]string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete}, r.Method) {
		return r.Method
	}
	return "other"
}

func (a *api) limit(r *http.Request, of body) int64 {
	switch {
	case of == bodyArchive:
		return a.archive
	case r.URL.Path == "/v1/jobs":
		return maxSubmit
	}
	return maxBody
}

// check looks at a body's size and type. One that is empty needs no type.
func (b body) check(r *http.Request, limit int64) error {
	if r.ContentLength > limit {
		return &runtime.HTTPStatusError{HTTPStatus: http.StatusRequestEntityTooLarge, Err: bodyTooLarge(limit)}
	}
	if r.ContentLength == 0 {
		return nil
	}
	got, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || !slices.Contains(b.types(), got) {
		return &runtime.HTTPStatusError{HTTPStatus: http.StatusUnsupportedMediaType, Err: status.Errorf(codes.InvalidArgument,
			"%s %s: the body's Content-Type is %.80q, and has to be %s", r.Method, r.URL.Path, r.Header.Get("Content-Type"), strings.Join(b.types(), " or "))}
	}
	return nil
}

func bodyTooLarge(limit int64) error {
	return status.Errorf(codes.InvalidArgument, "the body is larger than the %d MiB that are allowed", limit>>20)
}

// fromElsewhere refuses a request that a browser sends on behalf of another site's
// page. A farm on loopback lets everybody on the machine build: that must not be
// whatever page somebody looks at there.
func fromElsewhere(r *http.Request) error {
	refuse := func(httpStatus int, format string, args ...any) error {
		return &runtime.HTTPStatusError{HTTPStatus: httpStatus, Err: status.Errorf(codes.PermissionDenied, format, args...)}
	}
	if origin := r.Header.Get("Origin"); origin != "" {
		if u, err := url.Parse(origin); err != nil || u.Host == "" || !strings.EqualFold(u.Host, r.Host) {
			return refuse(http.StatusForbidden, "requests from pages of %.200q are not served", origin)
		}
	}
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
		return refuse(http.StatusForbidden, "requests from other sites' pages are not served")
	}
	// A name that its owner lets point here makes his pages "the same site" (DNS
	// rebinding). Over TLS, the certificate does not cover it.
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if r.TLS == nil && local != nil && local.IP.IsLoopback() && !loopback(r.Host) {
		return refuse(http.StatusMisdirectedRequest, "%.200q is not this machine: use http://localhost or the loopback address", r.Host)
	}
	return nil
}

// loopback tells whether a Host header names this machine for itself.
func loopback(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback() || host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// paced is a body that has to arrive in time.
type paced struct {
	io.ReadCloser
	control *http.ResponseController
	within  time.Duration
	each    bool // every read has its own time
	begun   bool
	err     error
}

// Read implements io.Reader.
func (p *paced) Read(b []byte) (int, error) {
	if p.each || !p.begun {
		p.begun = true
		_ = p.control.SetReadDeadline(time.Now().Add(p.within)) // where there are no deadlines, there is no network
	}
	n, err := p.ReadCloser.Read(b)
	if err != nil {
		// The connection goes on being read, to find out when the client has gone.
		_ = p.control.SetReadDeadline(time.Time{})
		p.err = err
	}
	return n, err
}

// tooLarge and late are a body's errors in HTTP's words.
func tooLarge(r *http.Request, err error) error {
	p, ok := r.Body.(*paced)
	if !ok || p.err == nil {
		return err
	}
	if limit := (*http.MaxBytesError)(nil); errors.As(p.err, &limit) {
		return &runtime.HTTPStatusError{HTTPStatus: http.StatusRequestEntityTooLarge, Err: bodyTooLarge(limit.Limit)}
	}
	if errors.Is(p.err, os.ErrDeadlineExceeded) {
		return &runtime.HTTPStatusError{HTTPStatus: http.StatusRequestTimeout, Err: status.Error(codes.DeadlineExceeded, "the body did not arrive in time")}
	}
	return err
}

func misrouted(r *http.Request, code int) error {
	err := status.Errorf(codes.NotFound, "there is no %.200s: see docs/ci.md", r.URL.Path)
	switch code {
	case http.StatusMethodNotAllowed:
		err = status.Errorf(codes.Unimplemented, "%.200s: there is no %.20s", r.URL.Path, r.Method)
	case http.StatusBadRequest:
		err = status.Errorf(codes.InvalidArgument, "the path %.200q is malformed", r.URL.Path)
	}
	return &runtime.HTTPStatusError{HTTPStatus: code, Err: err}
}

// fail answers with an error.
func fail(w http.ResponseWriter, err error) {
	code := 0
	if with := (*runtime.HTTPStatusError)(nil); errors.As(err, &with) {
		code, err = with.HTTPStatus, with.Err
	}
	s := status.Convert(err)
	if inner := (interface{ GRPCStatus() *status.Status })(nil); errors.As(err, &inner) {
		s = inner.GRPCStatus() // without "rpc error" and the words around it
	}
	if code == 0 {
		code = runtime.HTTPStatusFromCode(s.Code())
	}
	if s.Code() == codes.ResourceExhausted || s.Code() == codes.Unavailable {
		w.Header().Set("Retry-After", "1")
	}
	body, err := answers.Marshal(s.Proto())
	if err != nil { // a detail of an unknown type
		body, code = fmt.Appendf(nil, `{"code": %d, "message": "the error could not be written as JSON"}`, codes.Internal), http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n')) // whoever does not read it has gone
}

// response knows what was answered, and gives a client its time for each part.
type response struct {
	http.ResponseWriter
	control *http.ResponseController
	route   string
	code    int
}

// WriteHeader implements http.ResponseWriter.
func (r *response) WriteHeader(code int) {
	r.code = code
	r.ResponseWriter.WriteHeader(code)
}

// Write implements http.ResponseWriter.
func (r *response) Write(b []byte) (int, error) {
	_ = r.control.SetWriteDeadline(time.Now().Add(patience)) // where there are no deadlines, there is no network
	return r.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (r *response) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func setRoute(w http.ResponseWriter, route string) {
	if r, ok := w.(*response); ok {
		r.route = route
	}
}

func routed(route string, next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		setRoute(w, route)
		next(w, r)
	})
}
