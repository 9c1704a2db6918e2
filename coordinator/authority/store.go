package authority

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/archfarm/archfarm/identity"
)

// The buckets of the database. Values are JSON.
var (
	tokensBucket  = []byte("tokens")       // id → token
	issuedBucket  = []byte("certificates") // serial → issued
	holdersBucket = []byte("holders")      // holder "/" serial → nothing: the certificates of a name
	revokedBucket = []byte("revoked")      // holder → revocation
)

const (
	// maxPerName bounds the certificates on record for one name, against a holder
	// that renews all the time. The oldest are forgotten first: revoking the name
	// finds them nevertheless, by their date.
	maxPerName = 16
	// revocationKept is how long a name's revocation is remembered: longer than any
	// token or certificate may last (398 days is also the limit that browsers' CAs keep).
	revocationKept = 400 * 24 * time.Hour
	pruneEvery     = time.Hour
	// expiredKept is how long an expired token is remembered, to tell its holder so.
	expiredKept = 24 * time.Hour
)

// token is a join token on record.
type token struct {
	// Seq orders tokens and revocations, whatever clocks do.
	Seq uint64 `json:"seq"`
	// Hash is the SHA-256 sum of the secret.
	Hash [sha256.Size]byte `json:"hash"`
	// Who joins with it, but for the name if that is free.
	Kind    identity.Kind `json:"kind"`
	Name    string        `json:"name,omitempty"`
	Tenant  string        `json:"tenant,omitempty"`
	Pools   []string      `json:"pools,omitempty"`
	Uses    uint32        `json:"uses"` // left
	Expires time.Time     `json:"expires"`
	TTL     time.Duration `json:"ttl"` // of certificates
}

// issued is a certificate on record.
type issued struct {
	Who identity.Identity `json:"who"`
	// Key is the SHA-256 sum of the public key (SubjectPublicKeyInfo).
	Key      [sha256.Size]byte `json:"key"`
	Token    string            `json:"token"` // by which the holder joined
	Seq      uint64            `json:"seq"`
	TTL      time.Duration     `json:"ttl"`
	NotAfter time.Time         `json:"notAfter"`
	Revoked  bool              `json:"revoked,omitempty"`
}

// revocation makes everything worthless that a name had when it was revoked.
type revocation struct {
	Seq uint64    `json:"seq"`
	At  time.Time `json:"at"`
}

// holder is the key of who holds certificates. Names have no slash.
func holder(who identity.Identity) string { return string(who.Kind) + "/" + who.Name }

func openDB(path string, shared bool) (*database, map[string]revocation, error) {
	db, err := openDatabase(path, shared)
	if err != nil {
		return nil, nil, fmt.Errorf("%w; put a copy of it back, or move it away: then its tokens are gone, and who was revoked is trusted again until its certificate expires", err)
	}
	var revoked map[string]revocation
	err = db.Update(func(tx *bolt.Tx) (err error) {
		for _, name := range [][]byte{tokensBucket, issuedBucket, holdersBucket, revokedBucket} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		revoked, err = revocations(tx)
		return err
	})
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("reading %s: %w", path, err), db.share())
	}
	return db, revoked, nil
}

// revocations are those on record, by holder.
func revocations(tx *bolt.Tx) (map[string]revocation, error) {
	out := map[string]revocation{}
	return out, each(tx, revokedBucket, func(who string, r revocation) { out[who] = r })
}

func put(tx *bolt.Tx, bucket []byte, key string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put([]byte(key), data)
}

// get returns nil for what there is not.
func get[T any](tx *bolt.Tx, bucket []byte, key string) (*T, error) {
	data := tx.Bucket(bucket).Get([]byte(key))
	if data == nil {
		return nil, nil
	}
	value := new(T)
	if err := json.Unmarshal(data, value); err != nil {
		return nil, fmt.Errorf("reading the record of %s %s: %w", bucket, key, err)
	}
	return value, nil
}

func getIssued(tx *bolt.Tx, serial *big.Int) (*issued, error) {
	return get[issued](tx, issuedBucket, serialKey(serial))
}

func serialKey(serial *big.Int) string { return serial.Text(16) }

// putIssued records a certificate, and forgets the oldest of the name beyond
// maxPerName.
func putIssued(tx *bolt.Tx, serial string, rec issued) error {
	var err error
	if rec.Seq, err = tx.Bucket(issuedBucket).NextSequence(); err != nil {
		return err
	}
	prefix := holder(rec.Who) + "/"
	if err := errors.Join(put(tx, issuedBucket, serial, rec), tx.Bucket(holdersBucket).Put([]byte(prefix+serial), nil)); err != nil {
		return err
	}
	oldest, count, least := "", 0, rec.Seq
	err = eachOf(tx, rec.Who, func(serial string, r issued) error {
		if count++; r.Seq < least {
			oldest, least = serial, r.Seq
		}
		return nil
	})
	if err != nil || count <= maxPerName {
		return err
	}
	return forget(tx, rec.Who, oldest)
}

func forget(tx *bolt.Tx, who identity.Identity, serial string) error {
	return errors.Join(tx.Bucket(issuedBucket).Delete([]byte(serial)), tx.Bucket(holdersBucket).Delete([]byte(holder(who)+"/"+serial)))
}

// eachOf calls f with each certificate on record for a name. f must not change the
// buckets.
func eachOf(tx *bolt.Tx, who identity.Identity, f func(serial string, rec issued) error) error {
	prefix := []byte(holder(who) + "/")
	cursor := tx.Bucket(holdersBucket).Cursor()
	for k, _ := cursor.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = cursor.Next() {
		serial := string(k[len(prefix):])
		rec, err := get[issued](tx, issuedBucket, serial)
		if err != nil {
			return err
		}
		if rec == nil {
			continue
		}
		if err := f(serial, *rec); err != nil {
			return err
		}
	}
	return nil
}

// prune forgets what has expired.
func (a *Authority) prune() error {
	now := a.cfg.Clock()
	var forgiven []string
	err := a.db.Update(func(tx *bolt.Tx) error {
		forgiven = nil
		expired, err := expiredKeys(tx, now)
		if err != nil {
			return err
		}
		for _, e := range expired {
			if err := tx.Bucket(e.bucket).Delete([]byte(e.key)); err != nil {
				return err
			}
			if bytes.Equal(e.bucket, revokedBucket) {
				forgiven = append(forgiven, e.key)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("tidying the authority's database: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, name := range forgiven {
		delete(a.revoked, name)
	}
	a.pruned = now
	return nil
}

type entry struct {
	bucket []byte
	key    string
}

func expiredKeys(tx *bolt.Tx, now time.Time) ([]entry, error) {
	var out []entry
	tokens := func(key string, t token) {
		if now.After(t.Expires.Add(expiredKept)) {
			out = append(out, entry{tokensBucket, key})
		}
	}
	certificates := func(key string, c issued) {
		if now.After(c.NotAfter) {
			out = append(out, entry{issuedBucket, key}, entry{holdersBucket, holder(c.Who) + "/" + key})
		}
	}
	revocations := func(key string, r revocation) {
		if now.After(r.At.Add(revocationKept)) {
			out = append(out, entry{revokedBucket, key})
		}
	}
	err := errors.Join(each(tx, tokensBucket, tokens), each(tx, issuedBucket, certificates), each(tx, revokedBucket, revocations))
	return out, err
}

func each[T any](tx *bolt.Tx, bucket []byte, f func(key string, value T)) error {
	return tx.Bucket(bucket).ForEach(func(k, v []byte) error {
		var value T
		if err := json.Unmarshal(v, &value); err != nil {
			return fmt.Errorf("reading the record of %s %s: %w", bucket, k, err)
		}
		f(string(k), value)
		return nil
	})
}
