// Package binfmt reads which foreign programs a Linux kernel hands to an
// interpreter: the handlers that are registered with binfmt_misc, such as qemu's
// user-mode emulators and Rosetta (Documentation/admin-guide/binfmt-misc.rst).
package binfmt

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
)

// Folder is where the kernel shows its handlers, if binfmt_misc is mounted.
const Folder = "/proc/sys/fs/binfmt_misc"

const (
	// looksAt is how much of a file the kernel compares (BINPRM_BUF_SIZE).
	looksAt = 256
	// maxText is more than the kernel writes of a handler: its registration is at
	// most 1920 bytes, and bytes are written as two digits.
	maxText = 16 << 10
	// maxHandlers is more than there are architectures, several times.
	maxHandlers = 1024
)

// Handler is one registration.
type Handler struct {
	// Enabled handlers are asked, others are only kept.
	Enabled bool
	// Interpreter is the absolute path of what executes the programs.
	Interpreter string
	// Flags are those of the registration, such as "POCF".
	Flags string

	offset      int
	magic, mask []byte // of one length; empty for a handler of file names
}

// Parse reads what the kernel shows of a handler.
func Parse(text string) (Handler, error) {
	var h Handler
	if len(text) > maxText {
		return h, fmt.Errorf("a handler of %d bytes", len(text))
	}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		var err error
		switch key {
		case "enabled":
			h.Enabled = true
		case "interpreter":
			h.Interpreter = value
		case "flags:":
			h.Flags = value
		case "offset":
			h.offset, err = strconv.Atoi(value)
		case "magic":
			h.magic, err = hex.DecodeString(value)
		case "mask":
			h.mask, err = hex.DecodeString(value)
		}
		if err != nil {
			return Handler{}, fmt.Errorf("a handler's %s: %w", key, err)
		}
	}
	return h, h.validate()
}

func (h *Handler) validate() error {
	if h.mask == nil { // not shown when every bit counts
		h.mask = make([]byte, len(h.magic))
		for i := range h.mask {
			h.mask[i] = 0xff
		}
	}
	switch {
	case h.Interpreter == "":
		return errors.New("a handler without an interpreter")
	case len(h.mask) != len(h.magic):
		return fmt.Errorf("a handler's mask of %d bytes for a magic of %d", len(h.mask), len(h.magic))
	case h.offset < 0 || h.offset+len(h.magic) > looksAt:
		return fmt.Errorf("a handler's magic of %d bytes at %d", len(h.magic), h.offset)
	}
	return nil
}

// InContainers tells whether the interpreter was opened when it was registered.
// Others are looked for inside the container, where they are not.
func (h Handler) InContainers() bool { return strings.Contains(h.Flags, "F") }

// Takes tells whether the kernel hands a file that begins like this to the
// interpreter.
func (h Handler) Takes(file []byte) bool {
	if !h.Enabled || len(h.magic) == 0 {
		return false
	}
	for i, want := range h.magic {
		var b byte // beyond the end the kernel sees zeros
		if at := h.offset + i; at < len(file) {
			b = file[at]
		}
		if (b^want)&h.mask[i] != 0 {
			return false
		}
	}
	return true
}

// List returns the handlers in a folder such as Folder. There are none where all
// of binfmt_misc is disabled. fs.ErrNotExist is in the error's chain if
// binfmt_misc is not mounted. A handler that cannot be read is left out; it may
// have been taken away this moment.
func List(folder fs.FS) ([]Handler, error) {
	status, err := fs.ReadFile(folder, "status")
	if err != nil {
		return nil, fmt.Errorf("reading the status of binfmt_misc: %w", err)
	}
	if strings.TrimSpace(string(status)) != "enabled" {
		return nil, nil
	}
	entries, err := fs.ReadDir(folder, ".")
	if err != nil {
		return nil, fmt.Errorf("listing the handlers of binfmt_misc: %w", err)
	}
	var handlers []Handler
	for _, e := range entries[:min(len(entries), maxHandlers)] {
		if e.Name() == "status" || e.Name() == "register" {
			continue
		}
		text, err := read(folder, e.Name())
		if err != nil {
			continue
		}
		if h, err := Parse(text); err == nil {
			handlers = append(handlers, h)
		}
	}
	return handlers, nil
}

func read(folder fs.FS, name string) (string, error) {
	f, err := folder.Open(name)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // only read
	b, err := io.ReadAll(io.LimitReader(f, maxText+1))
	return string(b), err
}
