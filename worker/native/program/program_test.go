package program

import (
	"bytes"
	"debug/elf"
	"errors"
	"strings"
	"testing"
)

func TestBytes_AreELFFilesWithCodeOfTheirListing(t *testing.T) {
	t.Parallel()
	entries, err := listings.ReadDir("listing")
	if err != nil || len(entries) != len(targets) {
		t.Fatalf("%d listings for %d targets, %v", len(entries), len(targets), err)
	}
	for arch, want := range targets {
		f, err := elf.NewFile(bytes.NewReader(Bytes(arch)))
		if err != nil {
			t.Errorf("%s: %v", arch, err)
			continue
		}
		if f.Machine != want.machine || f.Class != want.class || f.ByteOrder != want.order || f.Entry != base+codeOffset || f.Type != elf.ET_EXEC {
			t.Errorf("%s: %+v", arch, f.FileHeader)
		}
		load := f.Progs[0]
		if load.Type != elf.PT_LOAD || load.Flags != elf.PF_R|elf.PF_X || load.Vaddr%align != load.Off%align || int(load.Filesz) != len(Bytes(arch)) {
			t.Errorf("%s: %+v", arch, load.ProgHeader)
		}
		if stack := f.Progs[1]; stack.Type != elf.PT_GNU_STACK || stack.Flags&elf.PF_X != 0 {
			t.Errorf("%s: %+v", arch, stack.ProgHeader)
		}
		if code := len(Bytes(arch)) - codeOffset; code < 150 || code > 300 {
			t.Errorf("%s: %d bytes of code", arch, code)
		}
	}
	if Bytes("vax") != nil {
		t.Error("a program for a VAX")
	}
}

// Every line of a listing is a comment, a label, or bytes with their meaning.
func TestListings_HaveNoLineThatIsSkippedByMistake(t *testing.T) {
	t.Parallel()
	for arch := range targets {
		listing, err := listings.ReadFile("listing/" + arch + ".txt")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(listing)) {
			line = strings.TrimSuffix(line, "\n")
			digits, meaning, _ := strings.Cut(line, " ")
			if strings.HasPrefix(line, ";") || strings.HasSuffix(line, ":") && meaning == "" {
				continue
			}
			if len(assemble(digits)) == 0 || strings.TrimSpace(meaning) == "" {
				t.Errorf("%s: %q", arch, line)
			}
		}
	}
}

const (
	ownMaps = "00400000-00401000 r-xp 00000000 00:2a 19 /probe\n" +
		"7ffc0000-7ffd0000 rw-p 00000000 00:00 0 [stack]\n" +
		"7fff0000-7fff2000 r-xp 00000000 00:00 0                          [vdso]\n" +
		"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n"
	qemuMaps = "00400000-00401000 r--p 00000000 00:2a 19 /probe\n" +
		"7f000000-7f300000 r-xp 00000000 00:2a 12 /usr/bin/qemu aarch64\n"
	jitMaps = ownMaps + "7f400000-7f500000 rwxp 00000000 00:00 0\n"
)

func said(parts ...string) []byte { return []byte(strings.Join(parts, mark) + mark) }

func TestTestimony(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ exe, maps, want string }{
		"the program itself":                       {"/probe", ownMaps, ""},
		"an emulator":                              {"/usr/bin/qemu-aarch64", qemuMaps, `"/usr/bin/qemu-aarch64" executes`},
		"an emulator that hides its name":          {"/probe", qemuMaps, `code of "/usr/bin/qemu aarch64" executes`},
		"an emulator that copies the program":      {"/probe", jitMaps, `code of "" executes`},
		"nothing of the program is executed":       {"/probe", "00400000-00401000 r--p 00000000 00:2a 19 /probe\n", "is not what its process executes"},
		"no /proc":                                 {"", "", `"" executes`},
		"a name that only begins like the program": {"/probe (deleted)", ownMaps, "executes"},
	} {
		testimony, err := Parse(said(c.exe, "x86_64\x00\x00", c.maps, "flags : fpu\n"))
		if err != nil || testimony.Machine != "x86_64" || string(testimony.CPUInfo) != "flags : fpu\n" {
			t.Errorf("%s: %+v, %v", name, testimony, err)
			continue
		}
		err = testimony.Native("/probe")
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, ErrNotNative) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func TestParse_TakesClippedCPUInfoButNothingElse(t *testing.T) {
	t.Parallel()
	whole := said("/probe", "x86_64", ownMaps, "flags : fpu sse\nflags : fpu sse\n")
	clipped := bytes.TrimSuffix(whole, []byte(" sse\n"+mark))
	testimony, err := Parse(clipped)
	if err != nil || string(testimony.CPUInfo) != "flags : fpu sse\n" {
		t.Errorf("%q, %v", testimony.CPUInfo, err)
	}
	for _, b := range [][]byte{nil, []byte("/probe"), said("/probe"), said("/probe", "x86_64"), bytes.Repeat([]byte("x"), 1<<20)} {
		if _, err := Parse(b); err == nil || len(err.Error()) > 2*maxShown+200 {
			t.Errorf("%.40q: %v", b, err)
		}
	}
}

func FuzzTestimony(f *testing.F) {
	f.Add(said("/probe", "x86_64", ownMaps, "flags : fpu\n"))
	f.Add(said("/usr/bin/qemu", "aarch64", qemuMaps, ""))
	f.Fuzz(func(t *testing.T, output []byte) {
		testimony, err := Parse(output)
		if err != nil || testimony.Native("/probe") != nil {
			return
		}
		if testimony.Exe != "/probe" || !bytes.Contains(output, []byte("/probe"+mark)) {
			t.Errorf("native: %q", output)
		}
	})
}
