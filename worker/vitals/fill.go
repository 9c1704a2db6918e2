package vitals

// Fill tells a disk that is nearly full from one that is not. Full is one that is
// filled to High at least, and until it is below Low again: a little room made
// is used up by the next build.
type Fill struct {
	High, Low float64 // shares of the disk, 0 < Low < High <= 1
	full      bool
	overruled bool
}

// Update looks at the disk, and tells whether it counts as full. One that is not
// known does not.
func (f *Fill) Update(d Disk) (full bool) {
	switch used := d.Used(); {
	case d.Total == 0:
		f.full, f.overruled = false, false
	case used >= f.High:
		f.full = true
	case used < f.Low:
		f.full, f.overruled = false, false
	}
	return f.full && !f.overruled
}

// Overrule lets the disk count as not full until it has been below Low once: an
// operator knows better.
func (f *Fill) Overrule() { f.overruled = f.full }

// Target is how much of the disk is to be free for it to count as not full, with
// a little to spare, in bytes.
func (f *Fill) Target(d Disk) uint64 {
	const spare = 0.02
	return uint64((1 - max(0, f.Low-spare)) * float64(d.Total))
}
