// Command burn is a step of a build that is bound by the CPU: it generates source code, compresses it, hashes that and
// sorts the words, as often as it is told. It uses integers and memory, and no instructions that only some CPUs have.
package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"hash/adler32"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
)

// words is how many words one time has.
const words = 200_000

func main() {
	times, err := 0, error(nil)
	if len(os.Args) == 2 {
		times, err = strconv.Atoi(os.Args[1])
	}
	if err != nil || times < 1 {
		fmt.Fprintln(os.Stderr, "usage: burn TIMES")
		os.Exit(2)
	}
	fmt.Println(burn(times))
}

// burn returns the same for the same number of times, on every machine.
func burn(times int) uint32 {
	rng := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // always the same
	sum := adler32.New()
	for range times {
		all := make([]string, words)
		for i := range all {
			all[i] = "name" + strconv.Itoa(rng.IntN(words))
		}
		var packed bytes.Buffer
		w := gzip.NewWriter(&packed)
		for _, word := range all {
			_, _ = w.Write([]byte(word + " := ")) // to memory: never returns an error
		}
		_ = w.Close()
		slices.Sort(all)
		_, _ = sum.Write(packed.Bytes())
		_, _ = sum.Write([]byte(all[words/2]))
	}
	return sum.Sum32()
}
