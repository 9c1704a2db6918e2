package farmtest

import (
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// S3 is a server of S3's protocol (gofakes3) that keeps its content in memory.
type S3 struct {
	*Process
	// Attrs are those of BuildKit's cache of type s3 that reach it.
	Attrs string
	addr  string
}

// StartS3 starts a server with a bucket.
func StartS3(t T, tools Tools) *S3 {
	t.Helper()
	addr := freePort(t)
	s := &S3{
		Process: StartProcess(t, Spec{Name: "gofakes3", Path: tools.S3, Args: []string{"-backend", "memory", "-initialbucket", "caches", "-host", addr}}),
		Attrs:   "type=s3,region=local,bucket=caches,use_path_style=true,access_key_id=any,secret_access_key=any,endpoint_url=http://" + addr,
		addr:    addr,
	}
	for until := time.Now().Add(startLimit); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + addr + "/caches")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return s
			}
		}
		if time.Now().After(until) {
			t.Fatalf("gofakes3 does not answer: %v", err)
		}
	}
}

// Objects lists the keys that begin with a prefix, in order.
func (s *S3) Objects(t T, prefix string) []string {
	t.Helper()
	resp, err := http.Get("http://" + s.addr + "/caches?prefix=" + url.QueryEscape(prefix))
	if err != nil {
		t.Fatalf("listing the bucket: %v", err)
	}
	defer resp.Body.Close()
	var list struct {
		Contents []struct{ Key string }
	}
	if err := xml.NewDecoder(resp.Body).Decode(&list); err != nil {
		t.Fatalf("listing the bucket: %v", err)
	}
	var keys []string
	for _, c := range list.Contents {
		keys = append(keys, c.Key)
	}
	slices.Sort(keys)
	return keys
}

// ActionsCache is a server of the GitHub Actions cache's API, version 2: entries are written once, by way of a blob of
// Azure's protocol, and found by their key or the latest of a prefix.
type ActionsCache struct {
	// Attrs are those of BuildKit's cache of type gha that reach it.
	Attrs string

	server *httptest.Server
	mu     sync.Mutex
	blocks map[string]map[string][]byte // of uploads that are not committed, by key and block
	blobs  map[string][]byte
	done   []string // keys that are finalized, in this order
}

// StartActionsCache starts an empty one.
func StartActionsCache(t T) *ActionsCache {
	c := &ActionsCache{blocks: map[string]map[string][]byte{}, blobs: map[string][]byte{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /twirp/github.actions.results.api.v1.CacheService/{method}", c.service)
	mux.HandleFunc("PUT /blob", c.put)
	mux.HandleFunc("GET /blob", c.get)
	c.server = httptest.NewServer(mux)
	t.Cleanup(c.server.Close)
	part := func(v any) string {
		raw, _ := json.Marshal(v)
		return base64.RawURLEncoding.EncodeToString(raw)
	}
	token := part(map[string]string{"alg": "HS256", "typ": "JWT"}) + "." + part(map[string]any{
		"ac": `[{"Scope":"refs/heads/main","Permission":3}]`, "exp": time.Now().Add(time.Hour).Unix(), "nbf": time.Now().Add(-time.Hour).Unix(),
	}) + ".c2lnbmF0dXJl"
	c.Attrs = "type=gha,version=2,url_v2=" + c.server.URL + "/,token=" + token
	return c
}

// Keys lists the entries whose keys begin with a prefix, in order.
func (c *ActionsCache) Keys(prefix string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var keys []string
	for _, k := range c.done {
		if strings.HasPrefix(k, prefix) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

func (c *ActionsCache) service(w http.ResponseWriter, r *http.Request) {
	var req struct {
		Key         string   `json:"key"`
		RestoreKeys []string `json:"restore_keys"`
	}
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]any{"ok": true}
	switch r.PathValue("method") {
	case "CreateCacheEntry":
		if _, reserved := c.blocks[req.Key]; reserved {
			w.WriteHeader(http.StatusConflict)
			out = map[string]any{"code": "already_exists", "msg": "cache entry already exists", "message": "cache entry already exists"}
			break
		}
		c.blocks[req.Key] = map[string][]byte{}
		out["signed_upload_url"] = c.address(req.Key)
	case "FinalizeCacheEntryUpload":
		c.done = append(c.done, req.Key)
		out["entry_id"] = strconv.Itoa(len(c.done))
	case "GetCacheEntryDownloadURL":
		key := c.find(append([]string{req.Key}, req.RestoreKeys...))
		out["ok"], out["matched_key"], out["signed_download_url"] = key != "", key, c.address(key)
	default:
		http.NotFound(w, r)
		return
	}
	_ = json.NewEncoder(w).Encode(out)
}

// find returns the latest entry that one of the keys is a prefix of; a whole key comes first.
func (c *ActionsCache) find(keys []string) string {
	if slices.Contains(c.done, keys[0]) {
		return keys[0]
	}
	for _, k := range slices.Backward(c.done) {
		if slices.ContainsFunc(keys, func(prefix string) bool { return strings.HasPrefix(k, prefix) }) {
			return k
		}
	}
	return ""
}

func (c *ActionsCache) address(key string) string {
	return c.server.URL + "/blob?key=" + url.QueryEscape(key)
}

func (c *ActionsCache) put(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	key := r.URL.Query().Get("key")
	c.mu.Lock()
	defer c.mu.Unlock()
	switch r.URL.Query().Get("comp") {
	case "block":
		c.blocks[key][r.URL.Query().Get("blockid")] = body
	case "blocklist":
		var list struct{ Latest []string }
		if err := xml.Unmarshal(body, &list); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		for _, id := range list.Latest {
			c.blobs[key] = append(c.blobs[key], c.blocks[key][id]...)
		}
	default:
		c.blobs[key] = body
	}
	w.Header().Set("X-Ms-Request-Id", "1")
	w.WriteHeader(http.StatusCreated)
}

func (c *ActionsCache) get(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	blob, ok := c.blobs[r.URL.Query().Get("key")]
	c.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	if asked := r.Header.Get("X-Ms-Range"); asked != "" {
		r.Header.Set("Range", asked)
	}
	w.Header().Set("Etag", `"1"`)
	http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(blob)))
}
