package authority

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// TestShare_WhatOneIssuesAndRevokesIsTrueForBoth has two processes' authorities in one folder.
func TestShare_WhatOneIssuesAndRevokesIsTrueForBoth(t *testing.T) {
	t.Parallel()
	dir, evicted := t.TempDir(), make(chan identity.Identity, 4)
	quiet := func(c *Config) {
		c.Logger, c.Evict = slog.New(slog.DiscardHandler), func(who identity.Identity) { evicted <- who }
	}
	first := open(t, dir, quiet)
	if err := first.Share(); err != nil {
		t.Fatal(err)
	}
	second := open(t, dir, func(c *Config) { quiet(c); c.Shared, c.Evict = true, nil })

	key := newKeyT(t)
	cert, err := second.join(t, first.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind, Uses: 1}), "mac", key)
	if err != nil {
		t.Fatalf("a token of the other's: %v", err)
	}
	if _, err := first.renew(t, cert, key); err != nil {
		t.Errorf("renewing what the other has issued: %v", err)
	}
	if _, err := first.Check(cert); err != nil {
		t.Errorf("before it is revoked: %v", err)
	}
	if _, err := second.Revoke(socket(t), &archfarmv1.RevokeRequest{Kind: workerKind, Name: "mac"}); err != nil {
		t.Fatal(err)
	}
	select {
	case who := <-evicted:
		if who.Kind != identity.Worker || who.Name != "mac" {
			t.Errorf("evicted %v", who)
		}
	case <-time.After(10 * reviewEvery):
		t.Fatal("the other does not notice")
	}
	if _, err := first.Check(cert); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("after it was revoked: %v", err)
	}

	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.Alone(); err != nil || second.db.own == nil {
		t.Fatal(err)
	}
	again, err := second.join(t, second.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind, Uses: 1}), "mac", newKeyT(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Check(again); err != nil {
		t.Error(err)
	}
}

// TestAlone_LearnsWhatWasRevokedAtTheLastMoment by a process that has ended since.
func TestAlone_LearnsWhatWasRevokedAtTheLastMoment(t *testing.T) {
	t.Parallel()
	dir, evicted := t.TempDir(), make(chan identity.Identity, 1)
	first := open(t, dir, nil)
	cert, err := first.join(t, first.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind, Uses: 1}), "mac", newKeyT(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Share(); err != nil {
		t.Fatal(err)
	}
	second := open(t, dir, func(c *Config) {
		c.Shared, c.Evict, c.Logger = true, func(who identity.Identity) { evicted <- who }, nil
	})
	if _, err := first.Revoke(socket(t), &archfarmv1.RevokeRequest{Kind: workerKind, Name: "mac"}); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.Alone(); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Check(cert); err == nil {
		t.Error("it is good to the one that is left")
	}
	if who := <-evicted; who.Name != "mac" {
		t.Errorf("evicted %v", who)
	}
}
