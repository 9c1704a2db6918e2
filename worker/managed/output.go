package managed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"unicode"
)

const (
	// maxLine bounds a line of buildkitd's log, in bytes; the rest of a longer one
	// is dropped.
	maxLine = 16 << 10
	// maxLast bounds what of the last line goes into an error.
	maxLast = 300
)

// output takes what buildkitd writes, line by line, into the agent's log.
type output struct {
	log *slog.Logger

	mu   sync.Mutex
	line []byte // begun
	// last is what was said last that may explain its end: an error, or plain text, of which the first line tells the cause, and the others where.
	last  string
	plain bool // the last line was plain text
}

func newOutput(log *slog.Logger) *output { return &output{log: log.With("from", "buildkitd")} }

// Write never fails: buildkitd is not to block, or end, for its log's sake.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := len(p)
	for {
		piece, rest, ended := bytes.Cut(p, []byte("\n"))
		o.line = append(o.line, piece[:min(len(piece), maxLine-len(o.line))]...)
		if !ended {
			return n, nil
		}
		o.flush()
		p = rest
	}
}

// flush logs the line that was begun.
func (o *output) flush() {
	level, message, fields := parseLine(string(o.line))
	o.line = o.line[:0]
	if message == "" {
		return
	}
	plain := fields == nil
	if plain && !o.plain || !plain && level >= slog.LevelError {
		o.last = message
	}
	o.plain = plain
	o.log.LogAttrs(context.Background(), level, message, fields...) //nolint:sloglint // buildkitd's own words
}

// begin forgets what another run said.
func (o *output) begin() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.line, o.last, o.plain = o.line[:0], "", false
}

// explain says how buildkitd ended, err being that of Wait.
func (o *output) explain(err error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flush()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		err = errors.New("exit status 0")
	}
	if o.last == "" {
		return fmt.Errorf("buildkitd ended by itself: %w", err)
	}
	return fmt.Errorf("buildkitd ended by itself: %w: %s", err, strings.ToValidUTF8(o.last[:min(len(o.last), maxLast)], "…"))
}

var textLine = regexp.MustCompile(`^time=(?:"[^"]*"|\S+) level=([a-z]+) msg=("(?:[^"\\]|\\.)*"|\S+)`)

// parseLine reads a line of logrus, as JSON or as text; anything else is a message
// by itself. Fields is nil for that. A panic's stack arrives as such lines.
func parseLine(line string) (level slog.Level, message string, fields []slog.Attr) {
	line = strings.TrimRightFunc(line, unicode.IsSpace)
	var entry map[string]any
	if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &entry) == nil {
		fields = []slog.Attr{}
		for _, name := range []string{"error", "spanID", "traceID"} {
			if v, ok := entry[name].(string); ok {
				fields = append(fields, slog.String(name, v))
			}
		}
		word, _ := entry["level"].(string)
		message, _ = entry["msg"].(string)
		return parseLevel(word), message, fields
	}
	if m := textLine.FindStringSubmatch(line); m != nil {
		message = m[2]
		var unquoted string
		if json.Unmarshal([]byte(message), &unquoted) == nil {
			message = unquoted
		}
		return parseLevel(m[1]), message, []slog.Attr{}
	}
	return slog.LevelInfo, line, nil
}

// parseLevel translates logrus's levels; what buildkitd calls fatal is an error
// for the agent, which starts it again.
func parseLevel(word string) slog.Level {
	switch word {
	case "trace", "debug":
		return slog.LevelDebug
	case "warning", "warn":
		return slog.LevelWarn
	case "error", "fatal", "panic":
		return slog.LevelError
	}
	return slog.LevelInfo
}
