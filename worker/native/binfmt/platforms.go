package binfmt

import (
	"debug/elf"
	"encoding/binary"
	"slices"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// kind of programs, and the platforms that they are of.
type kind struct {
	machine   elf.Machine
	class     elf.Class
	data      elf.Data
	platforms []ocispecs.Platform
}

var kinds = []kind{
	{elf.EM_X86_64, elf.ELFCLASS64, elf.ELFDATA2LSB, linux("amd64")},
	{elf.EM_AARCH64, elf.ELFCLASS64, elf.ELFDATA2LSB, linux("arm64")},
	{elf.EM_RISCV, elf.ELFCLASS64, elf.ELFDATA2LSB, linux("riscv64")},
	{elf.EM_PPC64, elf.ELFCLASS64, elf.ELFDATA2LSB, linux("ppc64le")},
	{elf.EM_S390, elf.ELFCLASS64, elf.ELFDATA2MSB, linux("s390x")},
	{elf.EM_LOONGARCH, elf.ELFCLASS64, elf.ELFDATA2LSB, linux("loong64")},
	{elf.EM_386, elf.ELFCLASS32, elf.ELFDATA2LSB, linux("386")},
	{elf.EM_ARM, elf.ELFCLASS32, elf.ELFDATA2LSB, linux("arm", "v7", "v6")},
	{elf.EM_PPC64, elf.ELFCLASS64, elf.ELFDATA2MSB, linux("ppc64")},
	{elf.EM_MIPS, elf.ELFCLASS64, elf.ELFDATA2LSB, linux("mips64le")},
	{elf.EM_MIPS, elf.ELFCLASS64, elf.ELFDATA2MSB, linux("mips64")},
}

func linux(arch string, variants ...string) []ocispecs.Platform {
	if len(variants) == 0 {
		return []ocispecs.Platform{{OS: "linux", Architecture: arch}}
	}
	var list []ocispecs.Platform
	for _, v := range variants {
		list = append(list, ocispecs.Platform{OS: "linux", Architecture: arch, Variant: v})
	}
	return list
}

// Platforms are those of which the handlers execute programs in containers. The
// names of handlers say nothing: what counts is which ELF headers they take.
func Platforms(handlers []Handler) (found []ocispecs.Platform) {
	for _, k := range kinds {
		if slices.ContainsFunc(handlers, func(h Handler) bool { return h.InContainers() && k.taken(h) }) {
			found = append(found, k.platforms...)
		}
	}
	return found
}

// taken tells whether h takes such programs: those at fixed addresses and
// relocatable ones, for System V as most are and for GNU.
func (k kind) taken(h Handler) bool {
	for _, typ := range []elf.Type{elf.ET_EXEC, elf.ET_DYN} {
		for _, abi := range []elf.OSABI{elf.ELFOSABI_NONE, elf.ELFOSABI_LINUX} {
			if h.Takes(k.header(typ, abi)) {
				return true
			}
		}
	}
	return false
}

// header is the beginning of an ELF header, which is the same for 32 and 64 bits.
func (k kind) header(typ elf.Type, abi elf.OSABI) []byte {
	h := append([]byte(elf.ELFMAG), byte(k.class), byte(k.data), byte(elf.EV_CURRENT), byte(abi))
	h = append(h, make([]byte, elf.EI_NIDENT-len(h))...)
	var order binary.AppendByteOrder = binary.LittleEndian
	if k.data == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	h = order.AppendUint16(h, uint16(typ))
	h = order.AppendUint16(h, uint16(k.machine))
	return order.AppendUint32(h, uint32(elf.EV_CURRENT))
}
