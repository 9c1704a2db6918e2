package legbuild

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/job"
	jobspec "github.com/archfarm/archfarm/coordinator/job/spec"
	"github.com/archfarm/archfarm/coordinator/split"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	frontend = "dockerfile.v0"
	// The names that the Dockerfile frontend has for its folders.
	contextName, dockerfileName = "context", "dockerfile"
	// defaultProvenance is what buildx asks for when its user says nothing.
	defaultProvenance = "mode=min,inline-only=true"
	inlineCacheArg    = "BUILDKIT_INLINE_CACHE"
)

// cacheTypes are the caches that a job may use. BuildKit has others, such as local, that
// are folders of its client, which here is the coordinator.
var cacheTypes = []string{"registry", "inline", "gha", "s3", "azblob"}

// solveOpt is a leg as buildx would ask for it. Errors are InvalidArgument.
func solveOpt(leg job.Leg) (client.SolveOpt, error) {
	opt := client.SolveOpt{
		Ref: leg.Ref, Frontend: frontend, FrontendAttrs: attributes(leg),
		Exports: exports(leg),
		Session: []session.Attachable{secretsprovider.FromMap(leg.Secrets), newRegistryAuth(leg.Credentials)},
	}
	if err := addContext(&opt, leg); err != nil {
		return opt, err
	}
	err := addCaches(&opt, leg)
	return opt, err
}

// attributes are what the frontend is told of the job.
func attributes(leg job.Leg) map[string]string {
	spec := leg.Spec
	attrs := map[string]string{"platform": leg.Platform}
	if f := spec.GetDockerfile(); f != "" {
		attrs["filename"] = f
	}
	if t := spec.GetTarget(); t != "" {
		attrs["target"] = t
	}
	for k, v := range spec.GetBuildArgs() {
		attrs["build-arg:"+k] = v
	}
	for k, v := range spec.GetLabels() {
		attrs["label:"+k] = v
	}
	if spec.GetNoCache() {
		attrs["no-cache"] = ""
	}
	if spec.GetPull() {
		attrs["image-resolve-mode"] = pb.AttrImageResolveModeForcePull
	}
	if spec.GetProvenance() == "" {
		attrs["attest:provenance"] = defaultProvenance
	} else if v, ok := attestation("provenance", spec.GetProvenance()); ok {
		attrs["attest:provenance"] = v
	}
	if v, ok := attestation("sbom", spec.GetSbom()); ok {
		attrs["attest:sbom"] = v
	}
	return attrs
}

// attestation is an attestation's attribute, false for none.
func attestation(kind, value string) (string, bool) {
	if value == "" {
		return "", false
	}
	if wanted, err := strconv.ParseBool(value); err == nil {
		return "type=" + kind, wanted
	}
	for field := range strings.SplitSeq(value, ",") {
		if off, ok := strings.CutPrefix(strings.TrimSpace(field), "disabled="); ok {
			if disabled, err := strconv.ParseBool(off); err == nil && disabled {
				return "", false
			}
		}
	}
	return "type=" + kind + "," + value, true
}

// addContext says what is built: the unpacked folder, or a commit that the worker
// fetches.
func addContext(opt *client.SolveOpt, leg job.Leg) error {
	from := leg.Spec.GetContext()
	if leg.Dir == "" {
		return addGit(opt, from)
	}
	folder, err := fsutil.NewFS(leg.Dir)
	if err != nil {
		return status.Errorf(codes.Internal, "opening the context of job %s: %v", leg.Job, err)
	}
	opt.LocalMounts = map[string]fsutil.FS{contextName: folder, dockerfileName: folder}
	// BuildKit takes a file for unchanged that has the size and time that it had in the
	// folder with this key before: whatever is not the same context needs another key.
	opt.SharedKey = "job context " + from.GetDigest()
	if from.GetDigest() == "" {
		opt.SharedKey += leg.Ref
	}
	addSource(opt.FrontendAttrs, from.GetSource())
	return nil
}

// addSource tells where an uploaded folder comes from, for the provenance. Of a git
// context, BuildKit finds out itself.
func addSource(attrs map[string]string, s *archfarmv1.Source) {
	if u, err := url.Parse(s.GetUrl()); err == nil && s.GetUrl() != "" {
		if u.Scheme != "ssh" { // where git@ is no secret
			u.User = nil
		}
		attrs["vcs:source"] = u.String()
	} else if s.GetUrl() != "" && !strings.Contains(s.GetUrl(), "://") { // git@host:path, which is no URL
		attrs["vcs:source"] = s.GetUrl()
	}
	if revision := s.GetCommit(); revision != "" {
		if s.GetDirty() {
			revision += "-dirty"
		}
		attrs["vcs:revision"] = revision
	}
}

// addGit asks for a commit by its hash, which also older BuildKits understand, and
// which does not mind that the branch has moved on.
func addGit(opt *client.SolveOpt, from *archfarmv1.BuildContext) error {
	remote, commit, subdir := from.GetGit().GetUrl(), from.GetSource().GetCommit(), strings.Trim(from.GetGit().GetSubdir(), "/")
	if remote == "" || commit == "" {
		return status.Error(codes.InvalidArgument, "the job has neither an uploaded context nor a git commit")
	}
	u, err := url.Parse(remote)
	if err != nil || u.RawQuery != "" || u.Fragment != "" {
		return status.Errorf(codes.InvalidArgument, "%q is not the address of a git repository", redactedURL(remote))
	}
	if web := u.Scheme == "http" || u.Scheme == "https"; web && !strings.HasSuffix(u.Path, ".git") {
		// As a context, BuildKit would take it for a file to download.
		state := llb.Git(remote, "", llb.GitRef(commit), llb.GitSubDir(path.Clean("/"+subdir)), llb.WithCustomName("[context] "+remote))
		opt.FrontendInputs = map[string]llb.State{contextName: state, dockerfileName: state}
		return nil
	}
	opt.FrontendAttrs[contextName] = remote + "#" + commit
	if subdir != "" {
		opt.FrontendAttrs[contextName] += ":" + subdir
	}
	return nil
}

func redactedURL(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "the context"
	}
	return u.Redacted()
}

// addCaches has each of several legs put its share of a cache in a registry beside the
// place that was asked for, where the job merges them.
func addCaches(opt *client.SolveOpt, leg job.Leg) error {
	p, err := platforms.Parse(leg.Platform)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "the platform %q: %v", leg.Platform, err)
	}
	part := split.Leg{Platform: platforms.Normalize(p)}
	in, err := jobspec.FillCaches(leg.Spec.GetCacheFrom(), leg.Secrets)
	if err != nil {
		return err
	}
	out, err := jobspec.FillCaches(leg.Spec.GetCacheTo(), leg.Secrets)
	if err != nil {
		return err
	}
	for _, e := range slices.Concat(in, out) {
		if !slices.Contains(cacheTypes, e.GetType()) {
			return status.Errorf(codes.InvalidArgument, "a job cannot use a cache of the type %q, only %s", e.GetType(), strings.Join(cacheTypes, ", "))
		}
	}
	if inline, err := strconv.ParseBool(leg.Spec.GetBuildArgs()[inlineCacheArg]); err == nil && inline {
		out = append(out, &archfarmv1.CacheEntry{Type: "inline"})
	}
	for _, e := range in {
		opt.CacheImports = append(opt.CacheImports, client.CacheOptionsEntry{Type: e.GetType(), Attrs: attrsOf(e.GetAttrs())})
	}
	for _, e := range out {
		attrs := attrsOf(e.GetAttrs())
		if len(leg.Spec.GetPlatforms()) > 1 && e.GetType() == "registry" {
			attrs["ref"] = part.CacheRef(attrs["ref"])
		}
		opt.CacheExports = append(opt.CacheExports, client.CacheOptionsEntry{Type: e.GetType(), Attrs: attrs})
	}
	return nil
}

// attrsOf is a copy that BuildKit's client may write to.
func attrsOf(attrs map[string]string) map[string]string {
	if attrs == nil {
		return map[string]string{}
	}
	return maps.Clone(attrs)
}

// exports of a leg: its image, by digest only; nothing when there is nowhere to push to.
func exports(leg job.Leg) []client.ExportEntry {
	if len(leg.Repositories) == 0 {
		return nil
	}
	attrs := map[string]string{
		string(exptypes.OptKeyName):         strings.Join(leg.Repositories, ","),
		string(exptypes.OptKeyPush):         "true",
		string(exptypes.OptKeyPushByDigest): "true",
		string(exptypes.OptKeyUnpack):       "false",
	}
	if leg.Spec.GetInsecureRegistry() {
		attrs[string(exptypes.OptKeyInsecure)] = "true"
	}
	return []client.ExportEntry{{Type: client.ExporterImage, Attrs: attrs}}
}

// pushed reads which image the exporter made. Errors are Internal.
func pushed(leg job.Leg, response map[string]string) (ocispecs.Descriptor, error) {
	var d ocispecs.Descriptor
	if len(leg.Repositories) == 0 {
		return d, nil
	}
	raw, err := base64.StdEncoding.DecodeString(response[exptypes.ExporterImageDescriptorKey])
	if err == nil {
		err = json.Unmarshal(raw, &d)
	}
	if err == nil {
		err = checked(d, response[exptypes.ExporterImageDigestKey])
	}
	if err != nil {
		return ocispecs.Descriptor{}, status.Errorf(codes.Internal, "reading what the build of %s pushed: %v", leg.Platform, err)
	}
	return d, nil
}

func checked(d ocispecs.Descriptor, digest string) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("its digest %q: %w", d.Digest, err)
	}
	if digest != "" && d.Digest.String() != digest {
		return fmt.Errorf("it is said to be %s and %s", d.Digest, digest)
	}
	if d.Size <= 0 || d.MediaType == "" {
		return fmt.Errorf("a descriptor of %d bytes of type %q", d.Size, d.MediaType)
	}
	return nil
}
