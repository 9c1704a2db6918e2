// Package program holds one tiny program for every architecture that can be
// proven. A program tells who executes it: the CPU, or an emulator that
// pretends to be one.
//
// It needs nothing but a kernel with /proc: no library, no image. On its standard
// output it writes, each followed by a mark:
//
//  1. the target of /proc/self/exe
//  2. the machine's name as uname tells it
//  3. /proc/self/maps
//  4. /proc/cpuinfo
//
// The first and the third are read through a descriptor of the directory
// /proc/self. User-mode emulators answer for these files themselves, to keep up
// the pretence, but they go by the path, and "exe" relative to a directory is
// none that they know (qemu, linux-user/syscall.c, is_proc_myself). What comes
// back is the kernel's truth, in which the process is the emulator.
package program

import (
	"debug/elf"
	"embed"
	"encoding/binary"
	"encoding/hex"
	"strings"
)

// mark ends each part of what a program writes. It is data of the program.
const mark = "\n=archfarm=\n"

// target is what the kernel wants to read in the ELF header of a program.
type target struct {
	class   elf.Class
	order   binary.ByteOrder
	machine elf.Machine
	flags   uint32 // of the ABI
}

// targets are by Go's names of architectures. The machine code of each is in
// listing/, one instruction a line: its bytes, and what an assembler calls them.
var targets = map[string]target{
	"amd64":   {elf.ELFCLASS64, binary.LittleEndian, elf.EM_X86_64, 0},
	"386":     {elf.ELFCLASS32, binary.LittleEndian, elf.EM_386, 0},
	"arm64":   {elf.ELFCLASS64, binary.LittleEndian, elf.EM_AARCH64, 0},
	"arm":     {elf.ELFCLASS32, binary.LittleEndian, elf.EM_ARM, 0x05000000}, // EABI 5
	"riscv64": {elf.ELFCLASS64, binary.LittleEndian, elf.EM_RISCV, 0},
	"ppc64le": {elf.ELFCLASS64, binary.LittleEndian, elf.EM_PPC64, 2}, // ELFv2: the entry is code, no descriptor
	"s390x":   {elf.ELFCLASS64, binary.BigEndian, elf.EM_S390, 0},
}

//go:embed listing
var listings embed.FS

// The listings take the data and the code to be at these addresses.
const (
	base       = 0x400000
	dataOffset = 0x100
	codeOffset = 0x180
	align      = 0x10000 // the largest page that any of the kernels uses
)

// data is what the code finds at base+dataOffset.
var data = map[int]string{
	0x00: "/proc/self",
	0x10: "exe",
	0x18: "maps",
	0x20: "/proc/cpuinfo",
	0x30: mark,
}

// Bytes is the executable for an architecture in Go's notation ("amd64",
// "arm64"): a static ELF file of some 600 bytes. It is nil where there is none.
func Bytes(arch string) []byte {
	t, ok := targets[arch]
	if !ok {
		return nil
	}
	listing, err := listings.ReadFile("listing/" + arch + ".txt")
	if err != nil {
		return nil // the tests read all of them
	}
	file := make([]byte, codeOffset)
	for at, s := range data {
		copy(file[dataOffset+at:], s)
	}
	file = append(file, assemble(string(listing))...)
	copy(file, t.header(len(file)))
	return file
}

// assemble takes the bytes at the beginning of each line that is neither a
// comment (";") nor a label (":").
func assemble(listing string) (code []byte) {
	for line := range strings.Lines(listing) {
		digits, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if b, err := hex.DecodeString(digits); err == nil {
			code = append(code, b...)
		}
	}
	return code
}

// header is the ELF header and two program headers: the whole file, to be read
// and executed, and the word that the stack is not to be executed. Without that
// word some kernels make all memory executable.
func (t target) header(size int) []byte {
	if t.class == elf.ELFCLASS32 {
		return t.encode(
			elf.Header32{
				Ident: t.ident(), Type: uint16(elf.ET_EXEC), Machine: uint16(t.machine), Version: 1, Entry: base + codeOffset,
				Phoff: 52, Flags: t.flags, Ehsize: 52, Phentsize: 32, Phnum: 2,
			},
			elf.Prog32{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: uint32(size), Memsz: uint32(size), Align: align},
			elf.Prog32{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W), Align: 16},
		)
	}
	return t.encode(
		elf.Header64{
			Ident: t.ident(), Type: uint16(elf.ET_EXEC), Machine: uint16(t.machine), Version: 1, Entry: base + codeOffset,
			Phoff: 64, Flags: t.flags, Ehsize: 64, Phentsize: 56, Phnum: 2,
		},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: uint64(size), Memsz: uint64(size), Align: align},
		elf.Prog64{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W), Align: 16},
	)
}

func (t target) ident() (ident [elf.EI_NIDENT]byte) {
	copy(ident[:], elf.ELFMAG)
	ident[elf.EI_CLASS] = byte(t.class)
	ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	if t.order == binary.BigEndian {
		ident[elf.EI_DATA] = byte(elf.ELFDATA2MSB)
	}
	ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	return ident
}

func (t target) encode(parts ...any) (b []byte) {
	for _, part := range parts {
		b, _ = binary.Append(b, t.order, part) // structs of fixed size always can be
	}
	return b
}
