package httpapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// heartbeat is how often a client hears something, be there events or not: proxies
// cut connections on which nothing happens, and who has gone is noticed.
const heartbeat = 15 * time.Second

// events sends a job's events until the last one: each as a WatchResponse in one
// line, or as server-sent events (HTML standard, section 9.2) where Accept asks for
// them. Empty lines are heartbeats. A stream that breaks off ends with {"error": …},
// a google.rpc.Status, if it can; the client then goes on with the sequence number
// that it has.
func (a *api) events(w http.ResponseWriter, r *http.Request) {
	req, err := watchRequest(r)
	if err != nil {
		fail(w, err)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel() // ends the stream, and its receiver
	stream, err := a.jobs.Watch(ctx, req)
	if err != nil {
		fail(w, err)
		return
	}
	received := make(chan event)
	go func() { // ends with the stream, or with ctx
		for {
			e, err := stream.Recv()
			select {
			case received <- event{e, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	format := linewise
	if wantsServerSent(r) {
		format = serverSent
	}
	out := &eventWriter{w: w, control: http.NewResponseController(w), format: format}
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for done := false; !done && err == nil; {
		select {
		case <-beat.C:
			err = out.write(format.beat)
		case e := <-received:
			done, err = out.event(e)
			beat.Reset(heartbeat)
		}
	}
}

func watchRequest(r *http.Request) (*archfarmv1.WatchRequest, error) {
	req := &archfarmv1.WatchRequest{Id: r.PathValue("id")}
	after := r.Header.Get("Last-Event-ID") // an EventSource that connects again
	for name, values := range r.URL.Query() {
		if name != "after_seq" && name != "afterSeq" || len(values) != 1 {
			return nil, status.Errorf(codes.InvalidArgument, "the parameter %.80q: one after_seq is possible", name)
		}
		if after == "" {
			after = values[0]
		}
	}
	if after == "" {
		return req, nil
	}
	var err error
	if req.AfterSeq, err = strconv.ParseInt(after, 10, 64); err != nil || req.AfterSeq < 0 {
		return nil, status.Errorf(codes.InvalidArgument, "after_seq %.80q: it is the number of an event, or 0", after)
	}
	return req, nil
}

func wantsServerSent(r *http.Request) bool {
	for accept := range strings.SplitSeq(r.Header.Get("Accept"), ",") {
		if t, _, err := mime.ParseMediaType(accept); err == nil && t == "text/event-stream" {
			return true
		}
	}
	return false
}

type event struct {
	*archfarmv1.WatchResponse
	err error
}

// format is how events are written.
type format struct {
	contentType string
	beat        string
	event       func(seq int64, json []byte) string
	broken      func(json []byte) string
	end         string
}

var (
	linewise = format{
		contentType: "application/x-ndjson",
		beat:        "\n",
		event:       func(_ int64, json []byte) string { return string(json) + "\n" },
		broken:      func(json []byte) string { return `{"error":` + string(json) + "}\n" },
	}
	// serverSent ends with an event of its own: an EventSource would connect again.
	serverSent = format{
		contentType: "text/event-stream",
		beat:        ":\n\n",
		event:       func(seq int64, json []byte) string { return fmt.Sprintf("id: %d\ndata: %s\n\n", seq, json) },
		broken:      func(json []byte) string { return fmt.Sprintf("event: broken\ndata: %s\n\n", json) },
		end:         "event: end\ndata: {}\n\n",
	}
)

type eventWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	format  format
	begun   bool
}

// event writes what was received; done tells that it was the last. Its error tells
// that the client does not take it.
func (o *eventWriter) event(e event) (done bool, err error) {
	switch {
	case errors.Is(e.err, io.EOF):
		return true, o.write(o.format.end)
	case e.err != nil && !o.begun:
		fail(o.w, e.err)
		return true, nil
	case e.err != nil:
		return true, o.write(o.format.broken(compact(status.Convert(e.err).Proto())))
	}
	return false, o.write(o.format.event(e.GetEvent().GetSeq(), compact(e.WatchResponse)))
}

// compact is without the fields that are zero: there are many events.
func compact(m proto.Message) []byte {
	b, err := protojson.Marshal(m)
	if err != nil { // a detail of an unknown type, of an error
		return []byte("{}")
	}
	return b
}

func (o *eventWriter) write(s string) error {
	if !o.begun {
		o.begun = true
		o.w.Header().Set("Content-Type", o.format.contentType)
		o.w.Header().Set("X-Accel-Buffering", "no") // to reverse proxies
	}
	if _, err := io.WriteString(o.w, s); err != nil {
		return err
	}
	if err := o.control.Flush(); err != nil {
		return err
	}
	return o.control.SetWriteDeadline(time.Time{}) // which ends a stream of HTTP/2 even when nothing is written
}
