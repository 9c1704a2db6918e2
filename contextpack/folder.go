package contextpack

import (
	"archive/tar"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"
)

// Folder lists a folder as docker would send it: without what its .dockerignore, or
// the Dockerfile's own (Dockerfile.dockerignore), leaves out, but with the
// Dockerfile and these files themselves. Sockets are left out; devices and named
// pipes are refused.
//
// A Dockerfile that is elsewhere, or behind a link, is added to the context, with
// rules that hide it from COPY and ADD; Source.Dockerfile tells its name.
func Folder(dir string, o Options) (*Source, error) {
	root, err := realPath(dir)
	if err != nil {
		return nil, fmt.Errorf("the context: %w", err)
	}
	if info, err := os.Stat(root); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("the context %s is not a folder", dir)
	}
	d, err := findDockerfile(dir, root, o.Dockerfile)
	if err != nil {
		return nil, err
	}
	w := &walk{root: root, rules: d.rules}
	if err := w.folder("", undecided); err != nil {
		return nil, fmt.Errorf("the context %s: %w", dir, err)
	}
	return newSource(sorted(append(w.entries, d.added...)), d.name)
}

// sorted is the order of the archive: by name, and what is in a folder behind it.
func sorted(entries []entry) []entry {
	slices.SortFunc(entries, func(a, b entry) int { return compareNames(a.name, b.name) })
	return entries
}

func compareNames(a, b string) int {
	for i := range min(len(a), len(b)) {
		switch {
		case a[i] == b[i]:
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		default:
			return cmp.Compare(a[i], b[i])
		}
	}
	return cmp.Compare(len(a), len(b))
}

func realPath(name string) (string, error) {
	name, err := filepath.Abs(name)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(name)
}

// walk lists a folder.
type walk struct {
	root    string
	rules   *rules
	entries []entry
}

// folder lists what is in a folder; decided is what the rules say of itself.
func (w *walk) folder(name string, decided decision) error {
	list, err := os.ReadDir(filepath.Join(w.root, filepath.FromSlash(name)))
	if err != nil {
		return err
	}
	for _, item := range list {
		if err := w.entry(path.Join(name, item.Name()), item.IsDir(), decided); err != nil {
			return err
		}
	}
	return nil
}

func (w *walk) entry(name string, isDir bool, parent decision) error {
	d, err := w.rules.decide(name, parent)
	if err != nil {
		return err
	}
	if d.out && (!isDir || !w.rules.mayHoldExceptions(name)) {
		return nil
	}
	e, err := w.stat(name)
	switch {
	case errors.Is(err, errLeftOut), errors.Is(err, fs.ErrNotExist): // it is gone by now
		return nil
	case err != nil:
		return err
	}
	at := len(w.entries)
	w.entries = append(w.entries, e)
	if len(w.entries) > MaxEntries {
		return fmt.Errorf("more than %d files: leave some out by .dockerignore", MaxEntries)
	}
	if e.kind != tar.TypeDir {
		return nil
	}
	err = w.folder(name, d)
	if d.out && len(w.entries) == at+1 { // no exception was in it
		w.entries = w.entries[:at]
	}
	if d.out && errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

var errLeftOut = errors.New("not part of contexts")

func (w *walk) stat(name string) (entry, error) {
	file := filepath.Join(w.root, filepath.FromSlash(name))
	info, err := os.Lstat(file)
	if err != nil {
		return entry{}, err
	}
	if len(name) > maxName {
		return entry{}, fmt.Errorf("%.60s…: its path has %d bytes, at most %d are possible", name, len(name), maxName)
	}
	e := entry{name: name, mode: modeBits(info.Mode()), mtime: info.ModTime().Unix()}
	switch t := info.Mode().Type(); t {
	case 0:
		e.kind, e.size, e.content = tar.TypeReg, info.Size(), onDisk{name, file, info}
	case fs.ModeDir:
		e.kind = tar.TypeDir
	case fs.ModeSymlink:
		e.kind, e.mode = tar.TypeSymlink, 0o777
		e.link, err = os.Readlink(file)
	case fs.ModeSocket:
		return entry{}, errLeftOut
	default:
		err = fmt.Errorf("%s is %s: a context has files, folders and symbolic links; leave it out by .dockerignore", name, kindOf(t))
	}
	return e, err
}

func kindOf(t fs.FileMode) string {
	if t&fs.ModeNamedPipe != 0 {
		return "a named pipe"
	}
	return "a device"
}

// modeBits are permissions and the three other bits as tar and chmod(2) know them.
func modeBits(m fs.FileMode) int64 {
	bits := int64(m.Perm())
	for flag, bit := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&flag != 0 {
			bits |= bit
		}
	}
	return bits
}

// onDisk is a file as it was when it was listed.
type onDisk struct {
	name, file string
	info       fs.FileInfo
}

func (o onDisk) readAt(p []byte, off int64) error {
	// Should it have become a link or a pipe, that is neither followed nor waited for.
	f, err := os.OpenFile(o.file, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ELOOP):
		return &ChangedError{Name: o.name}
	case err != nil:
		return fmt.Errorf("the context: %w", err)
	}
	defer f.Close()
	if !o.same(f) {
		return &ChangedError{Name: o.name}
	}
	_, err = f.ReadAt(p, off)
	switch {
	case errors.Is(err, io.EOF):
		return &ChangedError{Name: o.name}
	case err != nil:
		return fmt.Errorf("the context: %w", err)
	case !o.same(f):
		return &ChangedError{Name: o.name}
	}
	return nil
}

func (o onDisk) same(f *os.File) bool {
	now, err := f.Stat()
	return err == nil && now.Size() == o.info.Size() && now.Mode() == o.info.Mode() && now.ModTime().Equal(o.info.ModTime())
}
