package sqlstore

import (
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/coordinator/store"
)

// CheckBlob says what is wrong with a blob's name, or its size.
func CheckBlob(tenant, blob string, data []byte) error {
	d := digest.Digest(blob)
	switch {
	case d.Validate() != nil || d.Algorithm() != digest.SHA256:
		return fmt.Errorf("blob %q: its digest should be sha256: and 64 hexadecimal digits", blob)
	case tenant == "":
		return fmt.Errorf("blob %s: it has no tenant", blob)
	case len(data) > store.MaxBlob:
		return fmt.Errorf("blob %s: it has %d bytes, at most %d are possible", blob, len(data), store.MaxBlob)
	}
	return nil
}
