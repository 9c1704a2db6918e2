package legbuild

import (
	"bytes"
	"context"
	"errors"
	"regexp"
	"strings"

	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
)

// maxMessage bounds an error's text, in bytes: it is kept with the job.
const maxMessage = 8 << 10

// Error is why a leg was not built: without secrets, and with the lines of the
// Dockerfile that it is about.
type Error struct {
	Code    codes.Code
	Message string
}

func (e *Error) Error() string { return e.Message }

// GRPCStatus gives the error its code.
func (e *Error) GRPCStatus() *status.Status { return status.New(e.Code, e.Message) }

// failure makes of a build's error one that can be kept and shown.
func failure(ctx context.Context, err error, hide *redactor) error {
	message := strings.TrimPrefix(build.Message(err), "failed to solve: ")
	code := codeOf(ctx, err, message)
	if source := sourceOf(err); source != "" {
		message += "\n" + source
	}
	message = strings.ToValidUTF8(hide.text(message), "\uFFFD")
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "") + "…"
	}
	return &Error{Code: code, Message: message}
}

func codeOf(ctx context.Context, err error, message string) codes.Code {
	if ctx.Err() != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return codes.DeadlineExceeded
		}
		return codes.Canceled
	}
	code := grpcerrors.Code(err)
	switch {
	case code == codes.Canceled:
		return codes.Aborted // not by us: the session was cut, or the coordinator is stopping
	case code != codes.Unavailable && registryAway(message):
		return codes.Unavailable
	case code == codes.OK:
		return codes.Unknown
	}
	return code
}

var (
	// What BuildKit's registry client (containerd's remotes/docker) says; errors have
	// no other mark by the time they get here.
	badAnswer = regexp.MustCompile(`unexpected status (code |from )[^\n]*: (429|5\d\d)\b|(429|5\d\d) (Too Many Requests|Internal Server Error|Bad Gateway|Service Unavailable|Gateway Timeout)`)
	// An answer with a body of the distribution specification's form is told by its code
	// alone. "unknown" is what registries say when something of theirs has failed, but
	// also stands for codes that BuildKit does not know.
	badCode  = regexp.MustCompile(`failed to (push|copy|resolve)[^\n]*: (unknown|unavailable|toomanyrequests): `)
	noAnswer = regexp.MustCompile(`failed to do request: [^\n]*(connection refused|connection reset|broken pipe|EOF|i/o timeout|TLS handshake timeout|no route to host|network is unreachable|server misbehaving|context deadline exceeded)`)
)

// registryAway tells whether a registry was the reason, and may be back. What a step
// of the build says does not count, as little as its own downloads.
func registryAway(message string) bool {
	if strings.Contains(message, "did not complete successfully") {
		return false
	}
	return badAnswer.MatchString(message) || badCode.MatchString(message) || noAnswer.MatchString(message)
}

// sourceOf shows the lines that an error is about, as BuildKit's clients do.
func sourceOf(err error) string {
	var b bytes.Buffer
	for _, s := range errdefs.Sources(err) {
		if !printable(s) {
			continue
		}
		if err := s.Print(&b); err != nil {
			return ""
		}
	}
	return strings.TrimRight(b.String(), "\n")
}

// printable tells whether Print, which trusts its input, can print s.
func printable(s *errdefs.Source) bool {
	for _, r := range s.GetRanges() {
		if r.GetStart() == nil || r.GetEnd() == nil {
			return false
		}
	}
	return true
}
