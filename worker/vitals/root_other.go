//go:build !linux

package vitals

import (
	"embed"
	"io/fs"
)

// rootFS is empty: only Linux tells all this in files.
func rootFS() fs.FS { return embed.FS{} }
