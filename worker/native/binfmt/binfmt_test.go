package binfmt

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/containerd/platforms"
)

// What the kernel shows of handlers as they are found on machines.
const (
	exactMask = "ffffffffffffff00fffffffffffffffffeffffff"
	anyABI    = "fffffffffffefe00fffffffffffffffffeffffff"
)

func shown(interpreter, flags, magic, mask string) string {
	return fmt.Sprintf("enabled\ninterpreter %s\nflags: %s\noffset 0\nmagic %s\nmask %s\n", interpreter, flags, magic, mask)
}

var (
	qemuARM64   = shown("/usr/bin/qemu-aarch64", "POCF", "7f454c460201010000000000000000000200b700", exactMask)
	qemuARM     = shown("/usr/bin/qemu-arm", "F", "7f454c4601010100000000000000000002002800", exactMask)
	qemuRISCV   = shown("/usr/bin/qemu-riscv64", "F", "7f454c460201010000000000000000000200f300", exactMask)
	qemuPPC64LE = shown("/usr/bin/qemu-ppc64le", "F", "7f454c4602010100000000000000000002001500", "ffffffffffffff00fffffffffffffffffeffff00")
	qemuS390X   = shown("/usr/bin/qemu-s390x", "F", "7f454c4602020100000000000000000000020016", "ffffffffffffff00fffffffffffffffffffeffff")
	rosetta     = shown("/media/rosetta/rosetta", "OCF", "7f454c4602010100000000000000000002003e00", anyABI)
	python      = "enabled\ninterpreter /usr/bin/python3.11\nflags: \noffset 0\nmagic a70d0d0a\n"
	wine        = "enabled\ninterpreter /usr/bin/wine\nflags: F\nextension .exe\n"
	anyELF      = "enabled\ninterpreter /opt/any\nflags: F\noffset 0\nmagic 7f454c46\n"
	atOffset    = "enabled\ninterpreter /opt/at\nflags: F\noffset 18\nmagic b700\n"
)

func TestPlatforms(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		handlers []string
		want     string
	}{
		"none":                            {nil, ""},
		"qemu":                            {[]string{qemuARM64, qemuARM, qemuRISCV, qemuPPC64LE, qemuS390X}, "linux/arm64 linux/riscv64 linux/ppc64le linux/s390x linux/arm/v7 linux/arm/v6"},
		"rosetta":                         {[]string{rosetta}, "linux/amd64"},
		"twice":                           {[]string{qemuARM64, qemuARM64}, "linux/arm64"},
		"disabled":                        {[]string{strings.Replace(qemuARM64, "enabled", "disabled", 1)}, ""},
		"not to be found in containers":   {[]string{strings.Replace(qemuARM64, "POCF", "POC", 1)}, ""},
		"other files":                     {[]string{python, wine}, ""},
		"a name that pretends":            {[]string{strings.Replace(qemuARM64, "/usr/bin/qemu-aarch64", "/usr/bin/qemu-x86_64", 1)}, "linux/arm64"},
		"by the machine at its place":     {[]string{atOffset}, "linux/arm64"},
		"every ELF file":                  {[]string{anyELF}, "linux/amd64 linux/arm64 linux/riscv64 linux/ppc64le linux/s390x linux/loong64 linux/386 linux/arm/v7 linux/arm/v6 linux/ppc64 linux/mips64le linux/mips64"},
		"the mask leaves the class open":  {[]string{shown("/q", "F", "7f454c460001010000000000000000000200b700", "ffffffff00ffff00fffffffffffffffffeffffff")}, "linux/arm64"},
		"a magic longer than the headers": {[]string{shown("/q", "F", "7f454c460201010000000000000000000200b700010000"+strings.Repeat("00", 60)+"01", "")}, ""},
	} {
		var handlers []Handler
		for _, text := range c.handlers {
			h, err := Parse(strings.Replace(text, "mask \n", "", 1))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			handlers = append(handlers, h)
		}
		var got []string
		for _, p := range Platforms(handlers) {
			got = append(got, platforms.Format(p))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	folder := fstest.MapFS{
		"status":       {Data: []byte("enabled\n")},
		"register":     {Mode: 0o200},
		"qemu-aarch64": {Data: []byte(qemuARM64)},
		"broken":       {Data: []byte("enabled\ninterpreter /q\nmagic 7\n")},
		"python3.11":   {Data: []byte(python)},
	}
	handlers, err := List(folder)
	if err != nil || len(handlers) != 2 || handlers[1].Interpreter != "/usr/bin/qemu-aarch64" && handlers[0].Interpreter != "/usr/bin/qemu-aarch64" {
		t.Errorf("%+v, %v", handlers, err)
	}
	folder["status"] = &fstest.MapFile{Data: []byte("disabled\n")}
	if handlers, err := List(folder); err != nil || len(handlers) != 0 {
		t.Errorf("disabled: %+v, %v", handlers, err)
	}
	if _, err := List(fstest.MapFS{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("not mounted: %v", err)
	}
}

func TestParse_RefusesWhatNoKernelShows(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"", "enabled\n", "enabled\ninterpreter /q\nmagic zz\n", "enabled\ninterpreter /q\noffset x\n",
		"enabled\ninterpreter /q\noffset -1\nmagic 7f\n", "enabled\ninterpreter /q\noffset 256\nmagic 7f\n",
		"enabled\ninterpreter /q\nmagic 7f45\nmask ff\n", strings.Repeat("enabled\n", maxText),
	} {
		if h, err := Parse(text); err == nil {
			t.Errorf("%.60q: %+v", text, h)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{qemuARM64, qemuS390X, rosetta, python, wine, anyELF, atOffset, ""} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		h, err := Parse(text)
		if err != nil {
			return
		}
		for _, k := range kinds {
			// A handler that takes a program says so of every program that differs only
			// where the mask does not look.
			file := k.header(2, 0)
			if !h.Takes(file) {
				continue
			}
			for i := range file {
				if at := i - h.offset; at < 0 || at >= len(h.mask) || h.mask[at] == 0 {
					file[i] ^= 0xff
				}
			}
			if !h.Takes(file) || !h.Enabled {
				t.Errorf("%q", text)
			}
		}
	})
}
