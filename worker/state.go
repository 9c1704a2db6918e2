package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/archfarm/archfarm/file"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// stateFile is what the agent keeps in its data folder of what it was told.
	stateFile = "state.json"
	// maxState bounds the file, in bytes.
	maxState = 64 << 10
	// maxOrderReason bounds an operator's reason, in bytes: a report has room for
	// what stands before it, too.
	maxOrderReason = 400
)

// order is what an operator last wanted of the worker. The zero value is nothing:
// that it takes attempts.
type order struct {
	// Action is "drain" or "cordon".
	Action string `json:"action,omitempty"`
	Reason string `json:"reason,omitempty"`
}

const (
	drainOrder  = "drain"
	cordonOrder = "cordon"
)

// orderOf reads a directive.
func orderOf(c *archfarmv1.WorkerChange) (order, error) {
	reason := printable(c.GetReason())
	switch c.GetAction() {
	case archfarmv1.WorkerChange_ACTION_DRAIN:
		return order{drainOrder, reason}, nil
	case archfarmv1.WorkerChange_ACTION_CORDON:
		return order{cordonOrder, reason}, nil
	case archfarmv1.WorkerChange_ACTION_UNCORDON:
		return order{}, nil
	}
	return order{}, fmt.Errorf("this agent knows no order %s: a newer one may", c.GetAction())
}

func (o order) state() archfarmv1.Worker_State {
	switch o.Action {
	case drainOrder:
		return archfarmv1.Worker_STATE_DRAINING
	case cordonOrder:
		return archfarmv1.Worker_STATE_CORDONED
	}
	return archfarmv1.Worker_STATE_READY
}

func (o order) String() string {
	words := map[string]string{drainOrder: "drained by an operator", cordonOrder: "cordoned by an operator"}[o.Action]
	if o.Reason != "" {
		return words + ": " + o.Reason
	}
	return words
}

// printable makes someone's words fit for a report's one line.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(s[:min(len(s), maxOrderReason)], ""))
	return strings.TrimSpace(s)
}

// kept is the content of the state file.
type kept struct {
	Operator order `json:"operator"`
}

// loadOrder returns what an operator told an earlier run of the agent. It fails
// if that cannot be known: a worker that was drained must not build.
func loadOrder(dir string) (order, error) {
	if dir == "" {
		return order{}, nil
	}
	path := filepath.Join(dir, stateFile)
	raw, err := file.Read(path, maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return order{}, nil
	}
	if err != nil {
		return order{}, fmt.Errorf("reading the worker's state: %w", err)
	}
	o, err := parseState(raw)
	if err != nil {
		return order{}, fmt.Errorf("reading the worker's state: %s: %w; remove the file for a worker that is neither drained nor cordoned", path, err)
	}
	return o, nil
}

func parseState(raw []byte) (order, error) {
	var k kept
	if err := json.Unmarshal(raw, &k); err != nil {
		return order{}, err
	}
	switch k.Operator.Action {
	case "", drainOrder, cordonOrder:
		k.Operator.Reason = printable(k.Operator.Reason)
		return k.Operator, nil
	}
	return order{}, fmt.Errorf("there is no order %q", k.Operator.Action)
}

// saveOrder replaces the state file as a whole.
func saveOrder(dir string, o order) error {
	raw, err := json.Marshal(kept{Operator: o})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return file.Replace(filepath.Join(dir, stateFile), append(raw, '\n'), 0o600)
}
