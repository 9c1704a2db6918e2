package schedule

import "slices"

// UpdateWorker tells one worker of the fleet as it is now, as Update with all others
// as they were would, and at a cost that does not grow with the fleet where only its
// load has changed. A worker that Update has not named is not added.
func (s *Scheduler) UpdateWorker(w Worker) {
	w.Slots, w.Used = min(max(w.Slots, 0), maxSlots), min(max(w.Used, 0), maxSlots)
	s.event(func() {
		i, attached := s.index[w.Name]
		switch {
		case !attached:
			return
		case !sameShape(s.fleet[i], w):
			next := slices.Clone(s.fleet)
			next[i] = w
			s.replace(next)
			return
		}
		s.fleet[i] = w
		if at, refused := s.refused[w.Name]; refused && (w.Reported.IsZero() || !w.Reported.Equal(at)) {
			delete(s.refused, w.Name)
			s.stale = true // even where its load is the same: slots there may be shared again
		}
		s.reckon(i)
	})
}
