// Package split turns one build request into the requests of its legs, and the
// legs' results into one result. It is pure: BuildKit's messages in, messages out.
package split

import (
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Attributes of the Dockerfile frontend (frontend/dockerui/config.go) that
// decide how a request is split.
const (
	optPlatform      = "platform"
	optMultiPlatform = "multi-platform"
	optRequestID     = "requestid"
	optSource        = "source"

	frontendGateway    = "gateway.v0"
	frontendDockerfile = "dockerfile.v0"
)

const (
	// maxPlatforms bounds the legs of one build.
	maxPlatforms = 64
	// maxName bounds, in bytes, how a platform is written: in requests, and as a
	// key of results.
	maxName = 255
	// maxStepName bounds, in bytes, a step's name: errors and logs carry it.
	maxStepName = 200
)

// Leg is one platform's share of a build.
type Leg struct {
	// Platform is normalised; the zero value stands for "whatever the worker's
	// default is", when the client named none.
	Platform ocispecs.Platform
}

// String is the platform in containerd's notation, which is also the key of the
// leg's part of a result.
func (l Leg) String() string {
	if l.Unnamed() {
		return "default platform"
	}
	return platforms.FormatAll(l.Platform)
}

// Unnamed tells whether the client left the platform to the builder.
func (l Leg) Unnamed() bool { return l.Platform.OS == "" && l.Platform.Architecture == "" }

// Legs returns the legs that a frontend request asks for, in the order asked,
// each platform once. A request without platforms, and one that only asks the
// frontend about the build (requestid: outline, targets, lint), is one leg.
// Errors are InvalidArgument.
func Legs(opt map[string]string) ([]Leg, error) {
	list := opt[optPlatform]
	if list == "" {
		return []Leg{{}}, nil
	}
	if n := strings.Count(list, ",") + 1; n > maxPlatforms {
		return nil, status.Errorf(codes.InvalidArgument, "reading the platforms of the build: %d platforms, at most %d are possible", n, maxPlatforms)
	}
	var legs []Leg
	for name := range strings.SplitSeq(list, ",") {
		p, err := parse(strings.TrimSpace(name))
		if err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "reading the platforms of the build: malformed platform %q (want os/arch or os/arch/variant, such as linux/arm64): %v", shorten(name, maxName), err)
		}
		leg := Leg{Platform: platforms.Normalize(p)}
		if !slices.ContainsFunc(legs, func(l Leg) bool { return l.String() == leg.String() }) {
			legs = append(legs, leg)
		}
	}
	if v, ok := opt[optMultiPlatform]; ok && len(legs) > 1 {
		if multi, err := strconv.ParseBool(v); err != nil || !multi {
			return nil, status.Errorf(codes.InvalidArgument, "conflicting options: %d platforms with multi-platform=%q", len(legs), v)
		}
	}
	if Question(opt) {
		return legs[:1], nil
	}
	return legs, nil
}

// Question tells whether a request only asks the frontend about the build.
func Question(opt map[string]string) bool { return opt[optRequestID] != "" }

// parse reads one platform. Its parts end up in names of stages and images, so
// they must begin with a letter or digit, which containerd does not ask for.
func parse(name string) (ocispecs.Platform, error) {
	if len(name) > maxName {
		return ocispecs.Platform{}, fmt.Errorf("%d bytes long, at most %d are possible", len(name), maxName)
	}
	p, err := platforms.Parse(name)
	if err != nil {
		return p, err
	}
	if !strings.Contains(name, "/") && p.OS == runtime.GOOS && name != runtime.GOOS {
		p.OS = "linux" // of a bare architecture: what the workers run, whatever this machine does
	}
	for _, part := range []string{p.OS, p.Architecture, p.Variant} {
		if part != "" && !unicode.IsLetter(rune(part[0])) && !unicode.IsDigit(rune(part[0])) {
			return p, fmt.Errorf("invalid part %q", part)
		}
	}
	if strings.Contains(platforms.FormatAll(p), ",") { // it can hide, escaped, in a version; lists would break
		return p, errors.New("it contains a comma")
	}
	return p, nil
}

// FrontendOpt returns the frontend's options for one leg of several.
// Multi-platform is not set: it would show in the leg's provenance.
func (l Leg) FrontendOpt(opt map[string]string) map[string]string {
	out := make(map[string]string, len(opt)+1)
	maps.Copy(out, opt)
	out[optPlatform] = l.String()
	delete(out, optMultiPlatform)
	return out
}

// Exec is a step that executes something.
type Exec struct {
	// Name is the step as its Dockerfile line shows it, such as "[3/4] RUN make",
	// shortened when it is long.
	Name string
	// Platform is what the step executes on; nil stands for the worker's own.
	Platform *ocispecs.Platform
}

// Execs lists the steps of a definition that execute something, before any has
// run. Errors are InvalidArgument.
func Execs(def *pb.Definition) ([]Exec, error) {
	var execs []Exec
	for i, raw := range def.GetDef() {
		op, err := readOp(i, raw)
		if err != nil {
			return nil, err
		}
		if op.GetExec() == nil {
			continue
		}
		execs = append(execs, Exec{Name: stepName(def, raw, op.GetExec()), Platform: platformOf(op.GetPlatform())})
	}
	return execs, nil
}

func readOp(i int, raw []byte) (*pb.Op, error) {
	var op pb.Op
	if err := op.UnmarshalVT(raw); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "reading step %d of the build's definition: %v", i, err)
	}
	return &op, nil
}

// platformOf is nil for no platform, and for one that names no architecture: that is
// the worker's own then. One without an operating system is not nothing: BuildKit
// takes it for its own system.
func platformOf(p *pb.Platform) *ocispecs.Platform {
	spec := ocispecs.Platform{OS: p.GetOS(), Architecture: p.GetArchitecture(), Variant: p.GetVariant(), OSVersion: p.GetOSVersion(), OSFeatures: p.GetOSFeatures()}
	if spec.Architecture == "" {
		return nil
	}
	if spec.OS == "" {
		spec.OS = "linux"
	}
	spec = platforms.Normalize(spec)
	return &spec
}

func stepName(def *pb.Definition, raw []byte, exec *pb.ExecOp) string {
	name := def.GetMetadata()[digest.FromBytes(raw).String()].GetDescription()["llb.customname"]
	if name == "" {
		name = strings.Join(exec.GetMeta().GetArgs(), " ")
	}
	return shorten(name, maxStepName)
}

// shorten cuts a text that comes from outside to so many bytes, whole characters.
func shorten(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	return strings.ToValidUTF8(s, "")
}

// DefinitionLeg is the leg of a build that comes as a bare definition: the
// platform that its first step to name one executes on, or else that of the first
// step to name one at all. Errors are InvalidArgument.
func DefinitionLeg(def *pb.Definition) (Leg, error) {
	var first Leg
	for i, raw := range def.GetDef() {
		op, err := readOp(i, raw)
		if err != nil {
			return Leg{}, err
		}
		p := platformOf(op.GetPlatform())
		switch {
		case p == nil:
		case op.GetExec() != nil:
			return Leg{Platform: *p}, nil
		case first.Unnamed():
			first.Platform = *p
		}
	}
	return first, nil
}

// Solve returns the request that starts one leg on a worker, narrowed to its
// platform when it is one of several. The leg's frontend
// calls follow separately, as the client's do.
func (l Leg) Solve(req *controlapi.SolveRequest, ref string, exporters []*controlapi.Exporter, narrow bool) *controlapi.SolveRequest {
	attrs := req.GetFrontendAttrs()
	if narrow {
		attrs = l.attrs(attrs)
	}
	return &controlapi.SolveRequest{
		Ref:                   ref,
		Session:               req.GetSession(),
		FrontendAttrs:         attrs,
		Cache:                 req.GetCache(),
		Entitlements:          req.GetEntitlements(),
		FrontendInputs:        req.GetFrontendInputs(),
		Internal:              req.GetInternal(),
		SourcePolicy:          req.GetSourcePolicy(),
		Exporters:             exporters,
		EnableSessionExporter: req.GetEnableSessionExporter(),
		SourcePolicySession:   req.GetSourcePolicySession(),
		CompatibilityVersion:  req.GetCompatibilityVersion(),
		ProxyNetwork:          req.GetProxyNetwork(),
	}
}

// Direct returns the frontend request that is equal to a request which names its
// frontend, or holds a definition, itself.
func Direct(req *controlapi.SolveRequest) *gwpb.SolveRequest {
	out := &gwpb.SolveRequest{
		Definition: req.GetDefinition(), Frontend: req.GetFrontend(), FrontendOpt: req.GetFrontendAttrs(), FrontendInputs: req.GetFrontendInputs(),
		AllowResultReturn: true, AllowResultArrayRef: true,
	}
	if out.Frontend == frontendGateway && out.FrontendOpt[optSource] == frontendDockerfile && !replaced(out.FrontendOpt) {
		out.Frontend, out.FrontendOpt = frontendDockerfile, maps.Clone(out.FrontendOpt) // as BuildKit does (solver/llbsolver/solver.go)
		delete(out.FrontendOpt, optSource)
	}
	for _, im := range req.GetCache().GetImports() {
		out.CacheImports = append(out.CacheImports, &gwpb.CacheOptionsEntry{Type: im.GetType(), Attrs: im.GetAttrs()})
	}
	return out
}

// replaced tells whether a named context stands in for the Dockerfile frontend.
func replaced(opt map[string]string) bool {
	for k := range opt {
		if k == "context:"+frontendDockerfile || strings.HasPrefix(k, "context:"+frontendDockerfile+"::") {
			return true
		}
	}
	return false
}

// attrs narrows the platform attribute: the exporter's verifier compares it
// with what the leg returns.
func (l Leg) attrs(attrs map[string]string) map[string]string {
	if l.Unnamed() || attrs[optPlatform] == "" {
		return attrs
	}
	return l.FrontendOpt(attrs)
}

// Head names what a definition is the result of: definitions that build on it
// refer to it by that. Empty for an empty definition, and for one that is malformed.
func Head(def *pb.Definition) digest.Digest {
	n := len(def.GetDef())
	if n == 0 {
		return ""
	}
	op, err := readOp(n-1, def.GetDef()[n-1])
	if err != nil || len(op.GetInputs()) != 1 {
		return ""
	}
	return digest.Digest(op.GetInputs()[0].GetDigest())
}

// PlatformLeg is the leg of a platform as BuildKit's messages have it; nil for none.
func PlatformLeg(p *pb.Platform) *Leg {
	spec := platformOf(p)
	if spec == nil {
		return nil
	}
	return &Leg{Platform: *spec}
}
