# archfarm: build, test, try. `make help` lists the targets.
.POSIX:
.NOTPARALLEL: # setup comes before what it installs for; go build uses every core by itself

GO = go
BIN = bin
TOOLS = $(BIN)/tools
# -X main.version; a checkout without a tag or without git still builds.
VERSION = $$(git describe --tags --always --dirty 2>/dev/null || echo devel)

ARCHFARM = CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w -X main.version=$(VERSION)"
# Builds a tool of tools/runtime; the version that it reports comes from the go.mod there.
RUNTIME = cd tools/runtime && CGO_ENABLED=0 $(GO) build -trimpath
STAMP = -ldflags "-s -w -X $$mod/version.Version=$$($(GO) list -m -f '{{.Version}}' $$mod)"
LINTER = CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w"

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

all: build

build: ## bin/archfarm for this machine: one static binary
	@mkdir -p $(BIN)
	@echo "building $(BIN)/archfarm"
	@$(ARCHFARM) -o $(BIN)/archfarm ./cmd/archfarm

cross: cross-linux-amd64 cross-linux-arm64 cross-darwin-arm64 ## bin/archfarm-OS-ARCH for linux/amd64, linux/arm64, darwin/arm64

cross-linux-amd64:
	@mkdir -p $(BIN)
	@echo "building $(BIN)/archfarm-linux-amd64"
	@GOOS=linux GOARCH=amd64 $(ARCHFARM) -o $(BIN)/archfarm-linux-amd64 ./cmd/archfarm
cross-linux-arm64:
	@mkdir -p $(BIN)
	@echo "building $(BIN)/archfarm-linux-arm64"
	@GOOS=linux GOARCH=arm64 $(ARCHFARM) -o $(BIN)/archfarm-linux-arm64 ./cmd/archfarm
cross-darwin-arm64:
	@mkdir -p $(BIN)
	@echo "building $(BIN)/archfarm-darwin-arm64"
	@GOOS=darwin GOARCH=arm64 $(ARCHFARM) -o $(BIN)/archfarm-darwin-arm64 ./cmd/archfarm

demo: setup build tools arm64vm ## build one image natively on an amd64 and an arm64 machine (root)
	@deploy/demo.sh

test: setup build tools ## every test; not as root, the end-to-end tests are skipped
	@if [ "$$(id -u)" = 0 ]; then $(MAKE) -s arm64vm; fi
	@deploy/test.sh

# FLAGS are those of go run ./loadtest/bench -h.
bench: setup build tools ## the farm beside buildx on its own, side by side (root)
	@deploy/setup.sh --bench || echo "going on without qemu-user: emulation is not measured"
	$(GO) run ./loadtest/bench $(FLAGS)

loadtest-fleet: setup build tools ## 1,000 workers join one coordinator, and come back after it was killed (root)
	$(GO) run ./loadtest/fleet

# FLAGS are those of go run ./loadtest/jobs -h.
loadtest-jobs: setup build tools ## 10,000 jobs published through one coordinator, which is killed on the way (root)
	$(GO) run ./loadtest/jobs -kill $(FLAGS)

# SUITE is buildx or one of BuildKit's: client, dockerfile, buildctl. FLAGS are those of go run ./conformance -h.
SUITE = buildx
conformance: setup build tools ## buildx's integration suite on a plain buildkitd and on a farm (root; SUITE=client)
	@$(GO) run ./conformance -suite $(SUITE) $(FLAGS)

lint: lint-tools ## go vet, golangci-lint, buf lint, buf breaking
	$(GO) vet ./...
	$(TOOLS)/golangci-lint run ./...
	$(TOOLS)/buf lint
	$(TOOLS)/buf breaking --against proto/api.txtpb

deploy-check: setup build $(TOOLS)/actionlint ## units, plist, user data, alerting rules and the guides' commands
	@deploy/check.sh

# proto/api.txtpb is what clients may rely on. It grows with the API; a change that breaks them is refused here, and by
# make lint, unless the file is removed first, which the change then shows.
generate: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc $(TOOLS)/protoc-gen-grpc-gateway ## proto/**/*.pb.go and proto/api.txtpb from proto/**/*.proto
	PATH="$$PWD/$(TOOLS):$$PATH" $(TOOLS)/buf generate
	test ! -e proto/api.txtpb || $(TOOLS)/buf breaking --against proto/api.txtpb
	$(TOOLS)/buf build --exclude-source-info --output proto/api.txtpb

setup: ## install the Debian packages that test and demo need (root)
	@if [ "$$(id -u)" = 0 ]; then deploy/setup.sh; else deploy/setup.sh || echo "not root: going on without"; fi

tools: $(TOOLS)/buildkitd $(TOOLS)/buildctl $(TOOLS)/buildx $(TOOLS)/registry $(TOOLS)/gofakes3 $(TOOLS)/grpcurl ## buildkitd, buildctl, buildx, registry, gofakes3, grpcurl in bin/tools
arm64vm: $(TOOLS)/buildkitd-linux-arm64 cross-linux-arm64 ## what the arm64 machine runs, and its image
	@deploy/arm64vm/image.sh >/dev/null
lint-tools: $(TOOLS)/buf $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc $(TOOLS)/protoc-gen-grpc-gateway $(TOOLS)/golangci-lint $(TOOLS)/actionlint ## buf, its plugins, golangci-lint and actionlint in bin/tools

$(TOOLS)/buildkitd: tools/runtime/go.mod tools/runtime/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@mod=github.com/moby/buildkit; $(RUNTIME) $(STAMP) -o ../../$@ $$mod/cmd/buildkitd
$(TOOLS)/buildkitd-linux-arm64: tools/runtime/go.mod tools/runtime/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@mod=github.com/moby/buildkit; export GOOS=linux GOARCH=arm64; $(RUNTIME) $(STAMP) -o ../../$@ $$mod/cmd/buildkitd
$(TOOLS)/buildctl: tools/runtime/go.mod tools/runtime/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@mod=github.com/moby/buildkit; $(RUNTIME) $(STAMP) -o ../../$@ $$mod/cmd/buildctl
$(TOOLS)/buildx: tools/runtime/go.mod tools/runtime/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@mod=github.com/docker/buildx; $(RUNTIME) $(STAMP) -o ../../$@ $$mod/cmd/buildx
$(TOOLS)/registry: tools/runtime/go.mod tools/runtime/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@$(RUNTIME) -ldflags "-s -w" -o ../../$@ github.com/distribution/distribution/v3/cmd/registry
$(TOOLS)/gofakes3: tools/runtime/go.mod tools/runtime/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@$(RUNTIME) -ldflags "-s -w" -o ../../$@ github.com/johannesboyne/gofakes3/cmd/gofakes3
$(TOOLS)/grpcurl: tools/runtime/go.mod tools/runtime/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@$(RUNTIME) -ldflags "-s -w" -o ../../$@ github.com/fullstorydev/grpcurl/cmd/grpcurl

$(TOOLS)/buf: tools/lint/go.mod tools/lint/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@cd tools/lint && $(LINTER) -o ../../$@ github.com/bufbuild/buf/cmd/buf
$(TOOLS)/actionlint: tools/lint/go.mod tools/lint/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@cd tools/lint && $(LINTER) -o ../../$@ github.com/rhysd/actionlint/cmd/actionlint
$(TOOLS)/golangci-lint: tools/golangci/go.mod tools/golangci/go.sum
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@cd tools/golangci && $(LINTER) -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
# The generators belong to the main module: they must match the runtime that the generated code links with.
$(TOOLS)/protoc-gen-go: go.mod
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@$(LINTER) -o $@ google.golang.org/protobuf/cmd/protoc-gen-go
$(TOOLS)/protoc-gen-go-grpc: go.mod
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@$(LINTER) -o $@ google.golang.org/grpc/cmd/protoc-gen-go-grpc
$(TOOLS)/protoc-gen-grpc-gateway: go.mod
	@mkdir -p $(TOOLS)
	@echo "building $@ (once)"
	@$(LINTER) -o $@ github.com/grpc-ecosystem/grpc-gateway/v2/protoc-gen-grpc-gateway

clean: ## remove bin/, tools included
	rm -rf $(BIN)

.PHONY: help all build cross cross-linux-amd64 cross-linux-arm64 cross-darwin-arm64 demo test bench loadtest-fleet loadtest-jobs conformance lint deploy-check generate setup tools arm64vm lint-tools clean
