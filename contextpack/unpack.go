package contextpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits bound what Unpack writes. Zero means the package's bounds.
type Limits struct {
	Entries int
	Bytes   int64 // of all files
}

// Unpacked is what was written.
type Unpacked struct {
	Entries int
	Bytes   int64 // of all files
}

// maxFolders bounds what Unpack remembers, in bytes of all folders' names.
const maxFolders = 64 << 20

// Unpack writes a context's archive, as Folder and Tarball make it, into an empty
// folder that nobody else writes to. The archive is not trusted: nothing is written
// outside of the folder nor through a link, and what is neither a file, a folder
// nor a symbolic link is refused. Owners are left alone; the owner may read
// everything. After an error, what has been written stays.
func Unpack(ctx context.Context, r io.Reader, dir string, l Limits) (Unpacked, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Unpacked{}, fmt.Errorf("unpacking a context: %w", err)
	}
	defer root.Close() //nolint:errcheck // nothing was written by it
	u := &unpacking{root: root, limits: l, folders: map[string]*folderSeen{".": {}}}
	if u.limits.Entries == 0 {
		u.limits.Entries = MaxEntries
	}
	if u.limits.Bytes == 0 {
		u.limits.Bytes = MaxBytes
	}
	if err := u.all(ctx, tar.NewReader(r)); err != nil {
		return u.done, fmt.Errorf("unpacking a context: %w", err)
	}
	return u.done, nil
}

type unpacking struct {
	root   *os.Root
	limits Limits
	done   Unpacked
	times  *times // nil: headers tell the times
	// folders are those that have been made: there are no others, so that a parent
	// that is one of them is no link. In order, the parents first.
	folders map[string]*folderSeen
	order   []string
	names   int // bytes
}

type folderSeen struct {
	mode fs.FileMode
	time time.Time
}

func (u *unpacking) all(ctx context.Context, t *tar.Reader) error {
	for first := true; ; first = false {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return u.finish()
		}
		if err != nil {
			return fmt.Errorf("the archive: %w", err)
		}
		if first && h.Typeflag == timesKind {
			if err := u.readTimes(h, t); err != nil {
				return err
			}
			continue
		}
		if err := u.entry(ctx, h, t); err != nil {
			return fmt.Errorf("%.100q: %w", h.Name, err)
		}
	}
}

func (u *unpacking) readTimes(h *tar.Header, r io.Reader) error {
	if h.Size > int64(u.limits.Entries)*6 { // a time takes at most 6 bytes
		return errTimes
	}
	var b bytes.Buffer
	if _, err := io.Copy(&b, r); err != nil {
		return fmt.Errorf("the archive: %w", err)
	}
	u.times = &times{rest: b.Bytes()}
	return nil
}

func (u *unpacking) entry(ctx context.Context, h *tar.Header, r io.Reader) error {
	if u.done.Entries++; u.done.Entries > u.limits.Entries {
		return fmt.Errorf("the context has more than %d files", u.limits.Entries)
	}
	name := strings.TrimSuffix(h.Name, "/")
	if name != path.Clean(name) || !fs.ValidPath(cleanForCheck(name)) || name == "." || len(name) > maxName || strings.Contains(name, "\x00") {
		return errors.New("not the path of a file within the context")
	}
	if u.folders[path.Dir(name)] == nil {
		return errors.New("its folder is not in the context")
	}
	mtime := clampTime(h.ModTime.Unix())
	if u.times != nil {
		var err error
		if mtime, err = u.times.next(); err != nil {
			return err
		}
	}
	at := time.Unix(mtime, 0)
	switch h.Typeflag {
	case tar.TypeReg:
		return u.file(ctx, name, h, r, at)
	case tar.TypeDir:
		return u.folder(name, h, at)
	case tar.TypeSymlink:
		return u.link(name, h.Linkname, at)
	default:
		return fmt.Errorf("neither a file, a folder nor a symbolic link (type %q)", h.Typeflag)
	}
}

func (u *unpacking) file(ctx context.Context, name string, h *tar.Header, r io.Reader, at time.Time) error {
	if u.done.Bytes += h.Size; u.done.Bytes > u.limits.Bytes {
		return fmt.Errorf("the context's files have more than %d MiB", u.limits.Bytes>>20)
	}
	f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, &reader{ctx, r})
	// After the writing, which clears the setuid bit.
	err = errors.Join(err, f.Chmod(modeOf(h)|0o400), f.Close())
	if err != nil {
		return err
	}
	return u.root.Chtimes(name, at, at)
}

func (u *unpacking) folder(name string, h *tar.Header, at time.Time) error {
	if u.names += len(name); u.names > maxFolders {
		return errors.New("the names of the context's folders are too long to be remembered")
	}
	if err := u.root.Mkdir(name, 0o700); err != nil {
		return err
	}
	u.folders[name] = &folderSeen{mode: modeOf(h) | 0o500, time: at}
	u.order = append(u.order, name)
	return nil
}

func (u *unpacking) link(name, target string, at time.Time) error {
	if err := u.root.Symlink(target, name); err != nil {
		return err
	}
	dir, err := u.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	ts := unix.NsecToTimespec(at.UnixNano())
	return unix.UtimesNanoAt(int(dir.Fd()), path.Base(name), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

// finish gives folders their modes and times, the innermost first, now that nothing
// is written into them.
func (u *unpacking) finish() error {
	if u.times != nil && len(u.times.rest) > 0 {
		return errTimes
	}
	for i := len(u.order) - 1; i >= 0; i-- {
		name, f := u.order[i], u.folders[u.order[i]]
		if err := u.root.Chmod(name, f.mode); err != nil {
			return err
		}
		if err := u.root.Chtimes(name, f.time, f.time); err != nil {
			return err
		}
	}
	return nil
}

// modeOf are the bits that chmod can set.
func modeOf(h *tar.Header) fs.FileMode {
	m := h.FileInfo().Mode()
	return m.Perm() | m&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)
}

// cleanForCheck makes fs.ValidPath look at the elements only: names of files need
// not be UTF-8.
func cleanForCheck(name string) string { return strings.ToValidUTF8(name, "?") }

// reader ends with its context.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}
