package job

import (
	"context"
	"errors"
	"strconv"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// tags is the TagService.
type tags struct {
	archfarmv1.UnimplementedTagServiceServer
	*server
}

var bindingStates = map[store.BindingState]archfarmv1.TagBinding_State{
	store.Pending:   archfarmv1.TagBinding_STATE_PENDING,
	store.Published: archfarmv1.TagBinding_STATE_PUBLISHED,
	store.Undone:    archfarmv1.TagBinding_STATE_UNDONE,
}

// ListTags implements archfarmv1.TagServiceServer.
func (t tags) ListTags(ctx context.Context, req *archfarmv1.ListTagsRequest) (*archfarmv1.ListTagsResponse, error) {
	repository, err := repositoryName(req.GetRepository())
	if err != nil {
		return nil, err
	}
	limit, err := pageSize(req.GetPageSize())
	if err != nil {
		return nil, err
	}
	var before int64
	if token := req.GetPageToken(); token != "" {
		if before, err = strconv.ParseInt(token, 10, 64); err != nil || before <= 0 {
			return nil, status.Error(codes.InvalidArgument, "page_token: it is none that ListTags returned")
		}
	}
	bindings, err := t.Store.Bindings(ctx, seen(ctx), repository, req.GetTag(), before, limit)
	if err != nil {
		return nil, unavailable("listing tags", err)
	}
	current := map[string]int64{}
	resp := &archfarmv1.ListTagsResponse{}
	for _, b := range bindings {
		now, known := current[b.Tag]
		if !known {
			c, err := t.Store.Current(ctx, b.Repository, b.Tag)
			if err != nil && !errors.Is(err, store.ErrNotFound) {
				return nil, unavailable("listing tags", err)
			}
			now, current[b.Tag] = c.ID, c.ID
		}
		resp.Bindings = append(resp.Bindings, bindingMessage(b, now == b.ID))
	}
	if len(bindings) == limit {
		resp.NextPageToken = strconv.FormatInt(bindings[limit-1].ID, 10)
	}
	return resp, nil
}

func bindingMessage(b store.Binding, current bool) *archfarmv1.TagBinding {
	return &archfarmv1.TagBinding{
		Repository: b.Repository, Tag: b.Tag, Digest: b.Digest, State: bindingStates[b.State], Immutable: b.Immutable, Current: current,
		Job: b.Job, Build: b.Build, Source: sourceMessage(b.Source), BindTime: stamp(b.Bound), PublishTime: published(b),
	}
}

func published(b store.Binding) *timestamppb.Timestamp {
	if b.State != store.Published {
		return nil
	}
	return stamp(b.Ended)
}

func sourceMessage(s store.Source) *archfarmv1.Source {
	if s == (store.Source{}) {
		return nil
	}
	return &archfarmv1.Source{Url: s.URL, Commit: s.Commit, Branch: s.Branch, Tag: s.Tag, CommitTime: stamp(s.CommitTime)}
}
