package gossip

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRejection(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"Decrypt packet failed: no installed keys could decrypt the message from=10.0.0.9:7946":                 "key 10.0.0.9",
		"Decrypt packet failed: unsupported encryption version 5 from=[2001:db8::9]:7946":                       "key 2001:db8::9",
		"failed to receive: no installed keys could decrypt the message from=10.0.0.9:40001":                    "key 10.0.0.9",
		"failed to receive: encryption is configured but remote state is not encrypted from=10.0.0.9:1":         "key 10.0.0.9",
		"failed to receive: remote state is encrypted and encryption is not configured from=10.0.0.9:1":         "key 10.0.0.9",
		`discarding packet with unacceptable label "consul": from=10.0.0.9:8301`:                                "label 10.0.0.9",
		`discarding stream with unacceptable label "": from=10.0.0.9:8301`:                                      "label 10.0.0.9",
		`discarding packet with unacceptable label "Decrypt packet failed from=10.9.9.9:1": from=10.0.0.9:8301`: "label 10.0.0.9",
		"failed to receive and remove the stream label header: read tcp: i/o timeout from=10.0.0.9:1":           "malformed 10.0.0.9",
		"UDP packet too short (0 bytes) from=10.0.0.9:1":                                                        "malformed 10.0.0.9",
		"msg type (205) not supported from=10.0.0.9:1":                                                          "malformed 10.0.0.9",
		"Failed to decode ping request: EOF from=<unknown":                                                      "malformed <unknown",
		"Failed to send ack: no buffer space from=10.0.0.9:1":                                                   "",
		"Failed push/pull merge: x from=10.0.0.9:1":                                                             "",
		"Refuting a suspect message (from: worker/a)":                                                           "",
		"Was able to connect to worker/a over TCP but UDP probes failed, network may be misconfigured":          "",
	} {
		got := ""
		if reason, source, ok := rejection(line); ok {
			got = string(reason) + " " + source
		}
		if got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
}

func FuzzRejection(f *testing.F) {
	f.Add("Decrypt packet failed: x from=10.0.0.9:7946")
	f.Add(": from=")
	f.Add("Decrypt packet failed from=:")
	f.Fuzz(func(t *testing.T, line string) {
		reason, source, ok := rejection(line)
		if ok && (reason == "" || source == "" || strings.ContainsAny(source, " \n")) {
			t.Errorf("%q: %q from %q", line, reason, source)
		}
	})
}

func TestLogWriter_WarnsOfASourceOnceAMinute(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		rejected := 0
		w := &logWriter{log: slog.New(slog.NewTextHandler(&out, nil)), rejected: func(Reason) { rejected++ }}
		say := func(from int, n int) {
			for range n {
				fmt.Fprintf(w, "2026/01/02 03:04:05 [ERR] memberlist: Decrypt packet failed: x from=10.0.%d.%d:7946\n", from/256, from%256)
			}
		}
		warnings := func() int { defer out.Reset(); return strings.Count(out.String(), "\n") }
		say(1, 1000)
		say(2, 1000)
		if got := warnings(); got != 2 || rejected != 2000 {
			t.Errorf("%d warnings of 2 sources, %d counted", got, rejected)
		}
		time.Sleep(alarmEvery - 1)
		say(1, 1)
		if got := warnings(); got != 0 {
			t.Errorf("%d warnings within a minute", got)
		}
		time.Sleep(time.Nanosecond)
		say(1, 10)
		if got := warnings(); got != 1 {
			t.Errorf("%d warnings in the next minute", got)
		}
		for from := range 10_000 { // forged
			say(from, 2)
		}
		if got := warnings(); got > maxSources || len(w.warned) > maxSources {
			t.Errorf("%d warnings of a flood, %d sources are remembered", got, len(w.warned))
		}
		time.Sleep(alarmEvery)
		say(9999, 1)
		if got := warnings(); got != 1 {
			t.Errorf("%d warnings after the flood", got)
		}
	})
}

func TestMissed_TriesCoordinatorsFirstLessAndLessOftenAndNotForEver(t *testing.T) {
	t.Parallel()
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port) }
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	m := missed{}
	m.remember("nobody", known{}, now)
	for i := range uint16(200) {
		m.remember(fmt.Sprint("w", i), known{gossip: at(i + 1)}, now.Add(time.Duration(i)))
	}
	m.remember("c", known{gossip: at(1000), coordinator: "10.0.0.1:8372"}, now)
	if _, kept := m["w199"]; len(m) != maxMissed || !kept {
		t.Fatalf("%d are remembered; the last one: %v", len(m), kept)
	}
	now = now.Add(time.Second)
	if due := m.due(now, time.Second); len(due) != missedAtOnce || due[0] != at(1000) {
		t.Errorf("due: %v", due)
	}
	for name := range m {
		if name != "c" {
			delete(m, name)
		}
	}
	var waits []time.Duration
	last := now
	for now.Before(last.Add(missedFor)) && len(m) > 0 {
		now = now.Add(time.Second)
		if len(m.due(now, time.Second)) > 0 {
			waits = append(waits, now.Sub(last))
			last = now
		}
	}
	if len(m) != 0 || waits[0] != time.Second || waits[1] != 2*time.Second || waits[len(waits)-1] != maxMissedWait {
		t.Errorf("%d remain; waits %v ... %v", len(m), waits[:2], waits[len(waits)-1])
	}
	m.remember("c", known{gossip: at(1)}, now)
	m.forget(at(1))
	if len(m) != 0 {
		t.Error("who answers is still missed")
	}
}
