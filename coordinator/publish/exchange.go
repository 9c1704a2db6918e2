package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/moby/buildkit/util/errutil"
	"github.com/moby/buildkit/version"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"github.com/archfarm/archfarm/manifest"
)

const (
	// maxTries of one request while the registry fails.
	maxTries = 4
	// maxPause bounds what a registry may ask for by Retry-After.
	maxPause = 20 * time.Second
	// maxChallenges is how often one request is sent again with other credentials.
	maxChallenges = 4
	// maxAnswer is how long a registry may take for one request.
	maxAnswer = 2 * time.Minute
)

// firstPause before the second try; each further one is twice as long. Tests of a
// registry that really runs do not wait for it.
var firstPause = time.Second

// errMissing: the registry says that there is no such thing.
var errMissing = fmt.Errorf("the registry has no such manifest: %w", cerrdefs.ErrNotFound)

// errSlow: the registry took longer than maxAnswer.
var errSlow = fmt.Errorf("the registry did not answer within %s", maxAnswer)

// endpoint is a repository of a registry.
type endpoint struct {
	hosts  docker.RegistryHosts
	domain string
	path   string // of the repository
	push   bool   // ask for the right to push
	given  *given // nil: a session's
}

// host is the one that is pushed to; what is there is also looked up there.
func (e endpoint) host() (docker.RegistryHost, error) {
	known, err := e.hosts(e.domain)
	if err != nil {
		return docker.RegistryHost{}, err
	}
	for _, h := range known {
		if h.Capabilities.Has(docker.HostCapabilityPush) {
			return h, nil
		}
	}
	return docker.RegistryHost{}, fmt.Errorf("no host to push to: %w", cerrdefs.ErrNotFound)
}

// look returns what a tag or digest is, errMissing when it is nothing.
func (e endpoint) look(ctx context.Context, object string) (ocispecs.Descriptor, error) {
	answer, err := e.exchange(ctx, message{method: http.MethodHead, object: object})
	if err == nil && answer.status == http.StatusOK {
		d := digest.Digest(answer.header.Get("Docker-Content-Digest"))
		if d.Validate() == nil {
			return ocispecs.Descriptor{MediaType: mediaType(answer.header), Digest: d, Size: answer.length}, nil
		}
	}
	switch {
	case err != nil:
		return ocispecs.Descriptor{}, err
	case answer.status == http.StatusNotFound:
		return ocispecs.Descriptor{}, errMissing
	case answer.status != http.StatusOK && answer.status != http.StatusMethodNotAllowed && answer.status != http.StatusForbidden:
		return ocispecs.Descriptor{}, answer.unexpected()
	}
	// Without a digest, or unable to do HEAD; and a refusal tells its reason to GET only.
	blob, kind, err := e.get(ctx, object)
	if answer.status == http.StatusForbidden && answered(err) == 0 {
		return ocispecs.Descriptor{}, answer.unexpected()
	}
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	return ocispecs.Descriptor{MediaType: kind, Digest: digest.FromBytes(blob), Size: int64(len(blob))}, nil
}

// get reads a manifest, errMissing when there is none.
func (e endpoint) get(ctx context.Context, object string) (blob []byte, kind string, err error) {
	answer, err := e.exchange(ctx, message{method: http.MethodGet, object: object})
	switch {
	case err != nil:
		return nil, "", err
	case answer.status == http.StatusNotFound:
		return nil, "", errMissing
	case answer.status != http.StatusOK:
		return nil, "", answer.unexpected()
	case len(answer.body) > manifest.MaxBlob:
		return nil, "", fmt.Errorf("the manifest has more than %d bytes", manifest.MaxBlob)
	}
	return answer.body, mediaType(answer.header), nil
}

// put writes a manifest under a tag or its digest.
func (e endpoint) put(ctx context.Context, object string, c Content) error {
	answer, err := e.exchange(ctx, message{method: http.MethodPut, object: object, kind: c.Descriptor.MediaType, body: c.Blob})
	if err != nil {
		return err
	}
	switch answer.status {
	case http.StatusOK, http.StatusCreated, http.StatusAccepted, http.StatusNoContent: // 201 is the specified one
	default:
		return answer.unexpected()
	}
	got := digest.Digest(answer.header.Get("Docker-Content-Digest"))
	if got == "" {
		return nil // it need not tell
	}
	if err := got.Validate(); err != nil {
		return fmt.Errorf("the registry answers with a digest that is none: %w", err)
	}
	if got != c.Descriptor.Digest {
		return fmt.Errorf("the registry took it for %s, it is %s", got, c.Descriptor.Digest)
	}
	return nil
}

// message is a request about a manifest.
type message struct {
	method string
	object string
	kind   string // of body
	body   []byte
}

// answer is a response that has been read.
type answer struct {
	status   int
	header   http.Header
	length   int64
	body     []byte
	response *http.Response // its body is closed
}

func (a answer) unexpected() error {
	r := a.response.Request
	return remoteserrors.ErrUnexpectedStatus{
		Status: a.response.Status, StatusCode: a.status, Body: a.body,
		RequestURL: r.URL.Scheme + "://" + r.URL.Host + r.URL.Path, RequestMethod: r.Method,
	}
}

func mediaType(h http.Header) string {
	kind, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	return strings.TrimSpace(kind)
}

// exchange sends a message until it is answered. One that the registry fails at, or
// has no time for, is sent again, at most maxTries times in all: none of them does
// harm when it is done twice.
func (e endpoint) exchange(ctx context.Context, m message) (answer, error) {
	if e.push {
		ctx = docker.WithScope(ctx, "repository:"+e.path+":pull,push")
	} else {
		ctx = docker.WithScope(ctx, "repository:"+e.path+":pull")
	}
	pause := firstPause
	for try := 1; ; try++ {
		a, err := e.authorized(ctx, m)
		if ctx.Err() != nil && err != nil {
			return answer{}, ended(ctx)
		}
		if try == maxTries || !passing(a, err) {
			return a, err
		}
		timer := time.NewTimer(max(pause, a.asksFor()))
		select {
		case <-ctx.Done():
			timer.Stop()
			return answer{}, ended(ctx)
		case <-timer.C:
		}
		pause *= 2
	}
}

// ended is why a context has.
func ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, ctx.Err()) {
		return cause
	}
	return fmt.Errorf("%w: %w", ctx.Err(), cause)
}

// passing tells whether a failure may be over soon.
func passing(a answer, err error) bool {
	if err == nil {
		return passingStatus(a.status)
	}
	var answered remoteserrors.ErrUnexpectedStatus // of the token server
	var network net.Error
	switch {
	case errors.As(err, &answered):
		return passingStatus(answered.StatusCode)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, errSlow):
		return false
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, net.ErrClosed):
		return true
	}
	return errors.As(err, &network) && network.Timeout() || errors.Is(err, syscall.ECONNREFUSED)
}

func passingStatus(code int) bool {
	return code == http.StatusTooManyRequests || code == http.StatusRequestTimeout ||
		code >= http.StatusInternalServerError && code != http.StatusNotImplemented
}

// asksFor is how long the registry wants not to be asked.
func (a answer) asksFor() time.Duration {
	text := a.header.Get("Retry-After")
	if seconds, err := strconv.Atoi(text); err == nil {
		return min(time.Duration(min(max(seconds, 0), 1000))*time.Second, maxPause)
	}
	if at, err := http.ParseTime(text); err == nil {
		return min(time.Until(at), maxPause)
	}
	return 0
}

// authorized sends a message, and again with credentials when the registry asks for
// them.
func (e endpoint) authorized(ctx context.Context, m message) (answer, error) {
	host, err := e.host()
	if err != nil {
		return answer{}, err
	}
	var responses []*http.Response
	for {
		a, err := e.once(ctx, host, m)
		if err != nil || a.status != http.StatusUnauthorized || host.Authorizer == nil || len(responses) == maxChallenges {
			return a, err
		}
		responses = append(responses, a.response) //nolint:bodyclose // send has read and closed it
		switch err := host.Authorizer.AddResponses(ctx, responses); {
		case errors.Is(err, cerrdefs.ErrNotImplemented):
			return a, nil
		case err != nil:
			return answer{}, err
		}
	}
}

func (e endpoint) once(ctx context.Context, host docker.RegistryHost, m message) (answer, error) {
	ctx, done := context.WithTimeoutCause(ctx, maxAnswer, errSlow)
	defer done()
	address := host.Scheme + "://" + host.Host + path.Join("/", host.Path, e.path, "manifests", m.object)
	req, err := http.NewRequestWithContext(ctx, m.method, address, nil)
	if err != nil {
		return answer{}, err
	}
	for key, values := range host.Header {
		req.Header[key] = append(req.Header[key], values...)
	}
	req.Header.Set("User-Agent", version.UserAgent())
	if m.method == http.MethodPut {
		req.Header.Set("Content-Type", m.kind)
		req.ContentLength = int64(len(m.body))
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(m.body)), nil }
		req.Body, _ = req.GetBody()
	} else {
		req.Header.Set("Accept", accepted)
	}
	if host.Authorizer != nil {
		if err := host.Authorizer.Authorize(ctx, req); err != nil {
			if e.given != nil {
				e.given.forget()
			}
			return answer{}, fmt.Errorf("failed to authorize: %w", slow(ctx, err))
		}
	}
	a, err := send(host.Client, req)
	return a, slow(ctx, err)
}

// slow tells that it was the registry's time that ran out, if it was.
func slow(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errSlow) {
		return errSlow
	}
	return err
}

var accepted = strings.Join([]string{
	ocispecs.MediaTypeImageIndex, ocispecs.MediaTypeImageManifest,
	"application/vnd.docker.distribution.manifest.list.v2+json", "application/vnd.docker.distribution.manifest.v2+json", "*/*",
}, ", ")

func send(client *http.Client, req *http.Request) (answer, error) {
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	limit := int64(maxRefusal)
	if resp.StatusCode == http.StatusOK && req.Method == http.MethodGet {
		limit = manifest.MaxBlob + 1
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit))
	if err != nil {
		return answer{}, fmt.Errorf("reading the registry's answer: %w", err)
	}
	return answer{status: resp.StatusCode, header: resp.Header, length: resp.ContentLength, body: body, response: resp}, nil
}

// describe is a registry's error for people: its status, its own words, and no
// address that grants something.
func describe(err error) string {
	text := errutil.WithDetails(err).Error()
	if answer := answered(err); answer != 0 && !strings.Contains(text, http.StatusText(answer)) {
		text = fmt.Sprintf("%d %s: %s", answer, http.StatusText(answer), text)
	}
	return bare(text)
}

func codeOf(err error) codes.Code {
	var network *net.OpError
	answer := answered(err)
	switch {
	case errors.Is(err, errLost):
		return codes.Aborted
	case answer == http.StatusUnauthorized, answer == http.StatusForbidden, errors.Is(err, docker.ErrInvalidAuthorization):
		return codes.PermissionDenied
	case answer == http.StatusTooManyRequests, answer >= http.StatusInternalServerError, errors.Is(err, errSlow):
		return codes.Unavailable
	case errors.Is(err, errMissing), errors.Is(err, errNoBlob):
		return codes.NotFound
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.As(err, &network), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF): // before the deadline: a timeout to connect counts as one
		return codes.Unavailable
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return codes.Unknown
}

// answered is the HTTP status that a registry or its token server answered with,
// 0 for none. Of the latter's, BuildKit keeps only the registry's error code.
func answered(err error) int {
	var answer remoteserrors.ErrUnexpectedStatus
	if errors.As(err, &answer) {
		return answer.StatusCode
	}
	var coded docker.Errors
	var first docker.Error
	if errors.As(err, &coded) && len(coded) > 0 && errors.As(coded[0], &first) {
		return first.Code.Descriptor().HTTPStatusCode
	}
	return 0
}
