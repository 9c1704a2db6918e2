package gossip

import (
	"log/slog"
	"regexp"
	"strings"
)

// memberlistLine is what memberlist writes: the date of package log, a level and
// the message.
var memberlistLine = regexp.MustCompile(`(?s)^(?:\d{4}/\d\d/\d\d \d\d:\d\d:\d\d )?\[(\w+)\] (?:memberlist: )?(.*)$`)

// logWriter turns memberlist's lines into records: what it warns of stays a
// warning, everything else is for debugging.
type logWriter struct{ log *slog.Logger }

func (w *logWriter) Write(p []byte) (int, error) {
	log, message := w.log.Debug, strings.TrimSpace(string(p))
	if m := memberlistLine.FindStringSubmatch(message); m != nil {
		message = m[2]
		if m[1] == "WARN" || m[1] == "ERR" || m[1] == "ERROR" {
			log = w.log.Warn
		}
	}
	log(message, "from", "memberlist")
	return len(p), nil
}
