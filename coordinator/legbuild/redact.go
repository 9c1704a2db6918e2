package legbuild

import (
	"cmp"
	"encoding/base64"
	"slices"
	"strings"

	"github.com/archfarm/archfarm/coordinator/job"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// hidden stands where a secret was.
	hidden = "***"
	// minSecret is the shortest text that is hidden. Shorter ones are in every log.
	minSecret = 4
	// minSecretLine is the same for one line of a secret of several, such as a key's.
	minSecretLine = 8
	// maxNeedles bounds the lines of secrets that are looked for.
	maxNeedles = 10_000
)

// redactor takes the leg's secrets and passwords out of what its build says. It knows
// them as they are, and not what a step makes of them.
type redactor struct {
	needles  []string // the longest first
	replacer *strings.Replacer
	// held is the end of each log that may be the beginning of a secret.
	held map[logKey]*archfarmv1.VertexLog
}

type logKey struct {
	vertex string
	stream int64
}

func newRedactor(leg job.Leg) *redactor {
	r := &redactor{held: map[logKey]*archfarmv1.VertexLog{}}
	for _, s := range leg.Secrets {
		r.add(string(s))
	}
	for _, c := range leg.Credentials {
		r.add(c.GetPassword())
		r.add(c.GetIdentityToken())
		if c.GetPassword() != "" {
			r.add(base64.StdEncoding.EncodeToString([]byte(c.GetUsername() + ":" + c.GetPassword())))
		}
	}
	slices.SortFunc(r.needles, func(a, b string) int { return cmp.Or(len(b)-len(a), strings.Compare(a, b)) })
	r.needles = slices.Compact(r.needles)
	r.needles = r.needles[:min(len(r.needles), maxNeedles)]
	var pairs []string
	for _, n := range r.needles {
		pairs = append(pairs, n, hidden)
	}
	r.replacer = strings.NewReplacer(pairs...)
	return r
}

// add hides a secret: line by line, because logs may have them apart.
func (r *redactor) add(secret string) {
	secret = strings.TrimSpace(secret)
	shortest := minSecret
	if strings.ContainsAny(secret, "\r\n") {
		shortest = minSecretLine
	}
	for line := range strings.FieldsFuncSeq(secret, func(c rune) bool { return c == '\n' || c == '\r' }) {
		if line = strings.TrimSpace(line); len(line) >= shortest {
			r.needles = append(r.needles, line)
		}
	}
}

// text returns s without secrets.
func (r *redactor) text(s string) string { return r.replacer.Replace(s) }

// progress takes the secrets out of p. The end of a log that may be the beginning of
// a secret is held back until more of the log comes, or its vertex completes.
func (r *redactor) progress(p *archfarmv1.Progress) {
	if len(r.needles) == 0 {
		return
	}
	for _, l := range p.GetLogs() {
		r.log(l)
	}
	for _, v := range p.GetVertexes() {
		v.Name, v.Error = r.text(v.GetName()), r.text(v.GetError())
		if g := v.GetProgressGroup(); g != nil {
			g.Name = r.text(g.GetName())
		}
		if v.GetCompleted() != nil {
			p.Logs = append(p.Logs, r.release(v.GetDigest())...)
		}
	}
	for _, s := range p.GetStatuses() {
		s.Id, s.Name = r.text(s.GetId()), r.text(s.GetName())
	}
	for _, w := range p.GetWarnings() {
		w.Short, w.Url = []byte(r.text(string(w.GetShort()))), r.text(w.GetUrl())
		for i, d := range w.GetDetail() {
			w.Detail[i] = []byte(r.text(string(d)))
		}
	}
	p.Logs = slices.DeleteFunc(p.GetLogs(), func(l *archfarmv1.VertexLog) bool { return len(l.GetMsg()) == 0 })
}

func (r *redactor) log(l *archfarmv1.VertexLog) {
	key := logKey{l.GetVertex(), l.GetStream()}
	whole := string(l.GetMsg())
	if before := r.held[key]; before != nil {
		whole = string(before.GetMsg()) + whole
		delete(r.held, key)
	}
	sure := r.sure(whole)
	if sure < len(whole) {
		r.held[key] = &archfarmv1.VertexLog{Vertex: l.GetVertex(), Stream: l.GetStream(), Timestamp: l.GetTimestamp(), Msg: []byte(whole[sure:])}
	}
	l.Msg = []byte(r.text(whole[:sure]))
}

// sure is how much of s no more of the log can change: up to the first place, secrets
// that are there as a whole left out, from which s may be the beginning of one.
func (r *redactor) sure(s string) int {
	for at := 0; ; {
		from := len(s) - r.beginning(s[at:])
		start, end := r.find(s, at)
		if start < 0 || from <= start {
			return from
		}
		at = end
	}
}

// find returns where the first secret in s[at:] is, the longest if there are several;
// negative for none.
func (r *redactor) find(s string, at int) (start, end int) {
	start = -1
	for _, n := range r.needles {
		if i := strings.Index(s[at:], n); i >= 0 && (start < 0 || at+i < start) {
			start, end = at+i, at+i+len(n)
		}
	}
	return start, end
}

// beginning is the length of the longest end of s that a longer secret begins with.
func (r *redactor) beginning(s string) int {
	longest := 0
	for _, n := range r.needles {
		for k := min(len(n)-1, len(s)); k > longest; k-- {
			if strings.HasSuffix(s, n[:k]) {
				longest = k
				break
			}
		}
	}
	return longest
}

// release returns what is held back of a vertex's logs.
func (r *redactor) release(vertex string) []*archfarmv1.VertexLog {
	var out []*archfarmv1.VertexLog
	for _, stream := range []int64{1, 2, 0} {
		if l := r.held[logKey{vertex, stream}]; l != nil {
			delete(r.held, logKey{vertex, stream})
			l.Msg = []byte(r.text(string(l.GetMsg())))
			out = append(out, l)
		}
	}
	return out
}

// rest returns everything that is held back.
func (r *redactor) rest() *archfarmv1.Progress {
	p := &archfarmv1.Progress{}
	for _, l := range r.held {
		l.Msg = []byte(r.text(string(l.GetMsg())))
		p.Logs = append(p.Logs, l)
	}
	clear(r.held)
	slices.SortFunc(p.Logs, func(a, b *archfarmv1.VertexLog) int {
		return cmp.Or(strings.Compare(a.GetVertex(), b.GetVertex()), cmp.Compare(a.GetStream(), b.GetStream()))
	})
	return p
}
