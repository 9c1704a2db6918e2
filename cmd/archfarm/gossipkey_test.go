package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// keyholder answers with what it was asked for, in the shape of two keys.
type keyholder struct {
	archfarmv1.UnimplementedFleetServiceServer
	asked chan *archfarmv1.ChangeGossipKeysRequest
}

func (k *keyholder) ChangeGossipKeys(_ context.Context, req *archfarmv1.ChangeGossipKeysRequest) (*archfarmv1.ChangeGossipKeysResponse, error) {
	k.asked <- req
	if req.GetKeyId() == "refused" {
		return nil, status.Error(codes.FailedPrecondition, "mac-1 has not confirmed it")
	}
	return &archfarmv1.ChangeGossipKeysResponse{Keys: []*archfarmv1.GossipKey{
		{Id: "0011223344556677", Primary: true, Confirmed: 2}, {Id: "8899aabbccddeeff", Confirmed: 1, Missing: []string{"mac\x1b-1"}},
	}}, nil
}

func startKeyholder(t *testing.T) (*keyholder, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "farm.sock")
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	k := &keyholder{asked: make(chan *archfarmv1.ChangeGossipKeysRequest, 1)}
	server := grpc.NewServer()
	archfarmv1.RegisterFleetServiceServer(server, k)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return k, "unix://" + socket
}

func TestGossipKey_AsksAndShows(t *testing.T) {
	t.Parallel()
	k, farm := startKeyholder(t)
	secret := bytes.Repeat([]byte{7}, 32)
	text := base64.StdEncoding.EncodeToString(secret)
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const table = `ID                 IN USE   CONFIRMED   MISSING ON
0011223344556677   yes      2/2         
8899aabbccddeeff            1/2         mac?-1
`
	for _, c := range []struct {
		args []string
		want *archfarmv1.ChangeGossipKeysRequest
	}{
		{[]string{"list"}, &archfarmv1.ChangeGossipKeysRequest{Action: archfarmv1.ChangeGossipKeysRequest_ACTION_LIST}},
		{[]string{"install"}, &archfarmv1.ChangeGossipKeysRequest{Action: archfarmv1.ChangeGossipKeysRequest_ACTION_INSTALL}},
		{[]string{"install", text}, &archfarmv1.ChangeGossipKeysRequest{Action: archfarmv1.ChangeGossipKeysRequest_ACTION_INSTALL, Key: secret}},
		{[]string{"install", "--key-file", file}, &archfarmv1.ChangeGossipKeysRequest{Action: archfarmv1.ChangeGossipKeysRequest_ACTION_INSTALL, Key: secret}},
		{[]string{"use", "8899aabbccddeeff"}, &archfarmv1.ChangeGossipKeysRequest{Action: archfarmv1.ChangeGossipKeysRequest_ACTION_USE, KeyId: "8899aabbccddeeff"}},
		{[]string{"remove", "8899aabbccddeeff"}, &archfarmv1.ChangeGossipKeysRequest{Action: archfarmv1.ChangeGossipKeysRequest_ACTION_REMOVE, KeyId: "8899aabbccddeeff"}},
	} {
		got := run(t, append(append([]string{"gossip-key"}, c.args...), "--farm", farm)...)
		if asked := <-k.asked; !proto.Equal(asked, c.want) {
			t.Errorf("%q asks for %v", c.args, asked)
		}
		if got != table || strings.Contains(got, text) {
			t.Errorf("%q prints\n%s", c.args, got)
		}
	}
	const want = `[
  {
    "id": "0011223344556677",
    "primary": true,
    "confirmed": 2,
    "missing": []
  },
  {
    "id": "8899aabbccddeeff",
    "primary": false,
    "confirmed": 1,
    "missing": [
      "mac\u001b-1"
    ]
  }
]
`
	if got := run(t, "gossip-key", "list", "--farm", farm, "-o", "json"); got != want {
		t.Errorf("as JSON:\n%s", got)
	}
	<-k.asked
	if code, _, stderr := program(t, nil, "gossip-key", "use", "refused", "--farm", farm); code != exitError || !strings.Contains(stderr, "mac-1 has not confirmed it") {
		t.Errorf("refused: %d, %s", code, stderr)
	}
	for _, args := range [][]string{{"install", "short"}, {"install", text, text}, {"use"}, {"list", "x"}, {"nonsense"}} {
		if code, _, stderr := program(t, nil, append([]string{"gossip-key"}, args...)...); code != exitUsage || strings.Contains(stderr, text) {
			t.Errorf("%q: %d, %s", args, code, stderr)
		}
	}
}
