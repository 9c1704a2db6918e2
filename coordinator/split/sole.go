package split

import (
	"github.com/distribution/reference"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
)

// Publishing is who gives tags to an image that one leg makes.
type Publishing int

const (
	// ByWorker is as every buildkitd does it.
	ByWorker Publishing = iota
	// ByWorkerTold is the same, but the farm is told afterwards.
	ByWorkerTold
	// ByFarm has the worker push by digest only, as of several legs.
	ByFarm
)

// PlanSole decides which exports of a build's only leg the farm has a part in: those
// that give tags to an image, in repositories for which somebody else than the worker
// does that. Publishing is asked about normalized repositories, and about the empty one
// for an image whose name the frontend chooses. Nil: the worker does everything by
// itself. What makes no sense is left to the worker, which says so in BuildKit's words.
func PlanSole(exporters []*controlapi.Exporter, publishing func(repository string) Publishing) *ExportPlan {
	plan, needed, naming := &ExportPlan{exporters: exporters}, false, -1
	for i, e := range exporters {
		export := Export{Exporter: i, Sole: true, attrs: e.GetAttrs()}
		switch e.GetType() {
		case client.ExporterImage:
			switch export.tagged(publishing) {
			case ByFarm:
				export.Kind = KindImage
			case ByWorkerTold:
				export.Kind = KindPushed
			}
			needed = needed || export.Kind != KindForward
			if export.image.name != "" || export.image.dangles("") {
				naming = i
			}
		case client.ExporterOCI, client.ExporterDocker:
			if export.attrs[attrName] != "" {
				naming = i
			}
		}
		plan.exports = append(plan.exports, export)
	}
	if !needed {
		return nil
	}
	if naming >= 0 {
		plan.exports[naming].Naming = true
	}
	return plan
}

// tagged reads the image's attributes, and tells who gives it its tags.
func (e *Export) tagged(publishing func(repository string) Publishing) (who Publishing) {
	for k, v := range e.attrs {
		e.image.readName(k, v)
		if err := e.image.readPush(k, v); err != nil {
			return ByWorker
		}
	}
	if !e.image.push || e.image.byDigest {
		return ByWorker
	}
	name := e.image.chosen(nil)
	if name == anyName {
		return publishing("")
	}
	p, err := e.image.publication(name)
	if err != nil {
		return ByWorker
	}
	for _, name := range p.Names {
		named, err := reference.ParseNormalizedNamed(name)
		if _, fixed := named.(reference.Digested); err == nil && !fixed {
			who = max(who, publishing(named.Name()))
		}
	}
	return who
}
