package enroll

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	renewTimeout = 20 * time.Second
	// checkEvery is how often KeepFresh looks at the clock on the wall: timers stand
	// still while a machine sleeps, and certificates expire all the same.
	checkEvery = 5 * time.Minute
	// minBackoff and maxBackoff are between tries to renew.
	minBackoff, maxBackoff = 5 * time.Second, 10 * time.Minute
	// maxJitter is the share of a certificate's life that its renewal comes earlier
	// by at most, so that machines which joined together do not renew together.
	maxJitter = 0.1
)

// Renew gets a new certificate over a connection that shows the present one. The
// key stays: so there is no moment at which the files do not fit together, and an
// answer that got lost does no harm. A new token brings a new key.
func (c *Credentials) Renew(ctx context.Context, conn grpc.ClientConnInterface) error {
	if c.dir == "" {
		return errors.New("renewing the certificate: it is a file of the operator's own, which whoever made it renews")
	}
	pair, err := c.pair()
	if err != nil {
		return err
	}
	who, err := identity.Of(pair.Leaf)
	if err != nil {
		return err
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return errors.New("renewing the certificate: its key cannot sign")
	}
	csr, err := request(who.Name, key)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	answer, err := archfarmv1.NewAuthorityServiceClient(conn).Renew(ctx, &archfarmv1.RenewRequest{CertificateRequest: csr})
	if err != nil {
		return fmt.Errorf("renewing the certificate: %w", Explain(plain(err)))
	}
	leaf, err := checkAnswer(answer.GetCertificates(), answer.GetRoots(), key)
	if err != nil {
		return fmt.Errorf("renewing the certificate: the coordinator's answer: %w", err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != who.URI().String() {
		return errors.New("renewing the certificate: the coordinator's answer is for somebody else")
	}
	// Roots first: a new certificate may need a new one.
	if err := writeFile(c.dir, caFile, identity.EncodeCertificates(answer.GetRoots()...), 0o644); err != nil {
		return err
	}
	return writeFile(c.dir, certFile, identity.EncodeCertificates(answer.GetCertificates()...), 0o644)
}

// Explain adds to the error of a call what to do when the coordinator has refused
// the certificate: TLS says it in two words.
func Explain(err error) error {
	if err == nil {
		return nil
	}
	for alert, advice := range map[string]string{
		"remote error: tls: bad certificate":               "the coordinator does not accept this certificate, because it has been revoked, most likely: join again with a new token (archfarm token create)",
		"remote error: tls: expired certificate":           "this certificate has expired, or the clocks differ: join again with a new token (archfarm token create)",
		"remote error: tls: unknown certificate authority": "the coordinator is of another farm than this certificate: join it with a token of its own (archfarm token create)",
	} {
		if strings.Contains(err.Error(), alert) {
			return fmt.Errorf("%s (%w)", advice, err)
		}
	}
	return err
}

// KeepFresh renews the certificate when two thirds of its life are over, until the
// context ends. dial returns a connection to a coordinator, and what to do with it
// afterwards.
func (c *Credentials) KeepFresh(ctx context.Context, dial func(context.Context) (grpc.ClientConnInterface, func(), error)) {
	if c.dir == "" {
		return
	}
	backoff, jitter := time.Duration(0), rand.Float64() // no secret
	rest := time.Duration(0)                            // after a success, however short the life
	for {
		wait := backoff
		if backoff == 0 {
			wait = max(min(c.due(jitter).Sub(c.now()), checkEvery), rest)
		}
		if !sleep(ctx, wait) {
			return
		}
		if c.now().Before(c.due(jitter)) { // perhaps renewed by somebody else
			backoff = 0
			continue
		}
		if err := c.renewOver(ctx, dial); err != nil {
			if ctx.Err() != nil {
				return
			}
			backoff = min(max(2*backoff, minBackoff), maxBackoff)
			c.logger().WarnContext(ctx, "certificate not renewed", "error", err, "expires", c.NotAfter(), "again in", backoff)
			backoff = time.Duration(float64(backoff) * (1 + rand.Float64()/4)) // no secret
			continue
		}
		backoff, rest = 0, minBackoff
		c.logger().InfoContext(ctx, "certificate renewed", "expires", c.NotAfter())
	}
}

func (c *Credentials) renewOver(ctx context.Context, dial func(context.Context) (grpc.ClientConnInterface, func(), error)) error {
	if _, err := c.valid(); err != nil {
		return err
	}
	conn, done, err := dial(ctx)
	if err != nil {
		return err
	}
	defer done()
	return c.Renew(ctx, conn)
}

// due is when to renew; now when the files cannot be read, which says why.
func (c *Credentials) due(jitter float64) time.Time {
	pair, err := c.pair()
	if err != nil {
		return time.Time{}
	}
	return renewal(pair.Leaf, jitter)
}

// renewal is at two thirds of a certificate's life, or a little before: jitter is 0
// to 1.
func renewal(cert *x509.Certificate, jitter float64) time.Time {
	life := float64(cert.NotAfter.Sub(cert.NotBefore))
	return cert.NotBefore.Add(time.Duration(life * (2.0/3 - maxJitter*jitter)))
}

// sleep returns false when the context has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(max(d, 0))
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
