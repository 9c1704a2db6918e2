package gossip

import (
	"log/slog"
	"net"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Reason is why a packet or stream was not taken.
type Reason string

// The reasons, as metrics name them.
const (
	// WrongKey: it is encrypted with a key that this member does not have, or not
	// at all although it should be, or the other way round.
	WrongKey Reason = "key"
	// WrongLabel: it is of another program's memberlist, or of none.
	WrongLabel Reason = "label"
	// Malformed: it is nothing that memberlist understands.
	Malformed Reason = "malformed"
)

const (
	// alarmEvery is how often one source may cause a warning.
	alarmEvery = time.Minute
	// maxSources bounds the sources that are told apart: addresses can be forged.
	maxSources = 256
)

var (
	// memberlistLine is what memberlist writes: the date of package log, a level and
	// the message.
	memberlistLine = regexp.MustCompile(`(?s)^(?:\d{4}/\d\d/\d\d \d\d:\d\d:\d\d )?\[(\w+)\] (?:memberlist: )?(.*)$`)
	// memberlistSource is how its lines end that are about what somebody has sent. What
	// precedes may quote the sender.
	memberlistSource = regexp.MustCompile(`(?s)^(.*?):? from=(\S+)$`)
)

// rejections tell by their beginnings, or by a part of them, the lines that are
// about something which was not taken, the first that fits.
var rejections = []struct {
	prefix, part string
	reason       Reason
}{
	{"discarding packet with unacceptable label", "", WrongLabel},
	{"discarding stream with unacceptable label", "", WrongLabel},
	{"unexpected double", "label header", WrongLabel},
	{"Decrypt packet failed", "", WrongKey},
	{"failed to receive: no installed keys", "", WrongKey},
	{"failed to receive: remote state is encrypted", "", WrongKey},
	{"failed to receive: encryption is configured", "", WrongKey},
	{"failed to receive", "", Malformed},
	{"cannot decode label", "", Malformed},
	{"label header cannot be empty", "", Malformed},
	{"UDP packet too short", "", Malformed},
	{"missing message type byte", "", Malformed},
	{"msg type (", "not supported", Malformed},
	{"Message type (", "not supported", Malformed},
	{"Received invalid msgType", "", Malformed},
	{"Compound request had", "truncated", Malformed},
	{"Failed to decode", "", Malformed},
	{"Failed to decompress payload", "", Malformed},
	{"Failed to read remote state", "", Malformed},
}

// rejection tells of a message of memberlist whether it is about something that
// was not taken, why, and from where it came.
func rejection(message string) (reason Reason, source string, ok bool) {
	m := memberlistSource.FindStringSubmatch(message)
	if m == nil {
		return "", "", false
	}
	source = m[2]
	if host, _, err := net.SplitHostPort(source); err == nil && host != "" {
		source = host // ports change with every connection
	}
	for _, r := range rejections {
		if strings.HasPrefix(m[1], r.prefix) && strings.Contains(m[1], r.part) {
			return r.reason, source, true
		}
	}
	return "", "", false
}

// logWriter turns memberlist's lines into records: what it warns of stays a
// warning, everything else is for debugging. What strangers send is counted, and
// warned of once a minute for each of them.
type logWriter struct {
	log      *slog.Logger
	rejected func(Reason) // or nil

	mu     sync.Mutex
	warned map[string]time.Time // when last, by source and reason
}

func (w *logWriter) Write(p []byte) (int, error) {
	log, message := w.log.Debug, strings.TrimSpace(string(p))
	if m := memberlistLine.FindStringSubmatch(message); m != nil {
		message = m[2]
		if m[1] == "WARN" || m[1] == "ERR" || m[1] == "ERROR" {
			if reason, source, ok := rejection(message); ok {
				w.reject(reason, source, message)
				return len(p), nil
			}
			log = w.log.Warn
		}
	}
	log(message, "from", "memberlist")
	return len(p), nil
}

func (w *logWriter) reject(reason Reason, source, message string) {
	if w.rejected != nil {
		w.rejected(reason)
	}
	if !w.alarm(string(reason)+" "+source, time.Now()) {
		w.log.Debug("gossip was not taken", "address", source, "reason", string(reason))
		return
	}
	switch reason {
	case WrongKey:
		w.log.Warn("a machine gossips with a key that this farm does not have, or without one: it is ignored; if it belongs to the farm, give it the farm's keys", "address", source, "memberlist", message)
	case WrongLabel:
		w.log.Warn("a machine sends gossip that is not of an archfarm: it is ignored", "address", source, "memberlist", message)
	default:
		w.log.Warn("a machine sends gossip that makes no sense: it is ignored", "address", source, "memberlist", message)
	}
}

// alarm tells whether it is time to warn of a source again. When there are more
// sources than can be told apart, the ones beyond are not warned of.
func (w *logWriter) alarm(source string, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.warned == nil {
		w.warned = map[string]time.Time{}
	}
	if at, ok := w.warned[source]; ok && now.Sub(at) < alarmEvery {
		return false
	}
	if _, ok := w.warned[source]; !ok && len(w.warned) >= maxSources {
		for s, at := range w.warned {
			if now.Sub(at) >= alarmEvery {
				delete(w.warned, s)
			}
		}
		if len(w.warned) >= maxSources {
			return false
		}
	}
	w.warned[source] = now
	return true
}
