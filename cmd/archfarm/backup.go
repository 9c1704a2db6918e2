package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/coordinator"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
)

func newBackup() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backup --data-dir DIR FILE",
		Short: "Copy a coordinator's database while it runs",
		Long: `Copy the SQLite database in a coordinator's data folder, as of one moment, to a new
file: jobs with their events, the ledger of tags, stored secrets, the build history. The
coordinator may be running. The file is written as a whole or not at all, and can be read
by its owner only.

The copy is of that file alone. Keep besides, once: DIR/secrets.key, under which the
secrets in the copy are encrypted, apart from it; DIR/ca, without which all workers and
clients must join anew; and, copied while the coordinator is stopped, DIR/authority.db,
the tokens and revocations. Contexts that have been uploaded (DIR/blobs) are not needed:
clients send them again. A PostgreSQL store is backed up by PostgreSQL's own means
(pg_dump).

To restore: stop the coordinator, put the copy in the place of DIR/` + coordinator.StoreFile + `, remove
DIR/` + coordinator.StoreFile + `-wal and -shm, and start it again.`,
		Example: `  archfarm backup --data-dir /var/lib/archfarm /backup/archfarm.db
  archfarm backup --data-dir /var/lib/archfarm "/backup/archfarm-$(date +%F).db"`,
		Args: oneArg("the file to write"),
		RunE: func(cmd *cobra.Command, args []string) error {
			dir, _ := cmd.Flags().GetString("data-dir")
			return backup(cmd, dir, args[0])
		},
	}
	cmd.Flags().String("data-dir", defaultDataDir(), "the coordinator's data folder")
	outputFlag(cmd.Flags())
	return cmd
}

// backupJSON is a backup as --output json prints it.
type backupJSON struct {
	File  string `json:"file"`
	Bytes int64  `json:"bytes"`
}

func backup(cmd *cobra.Command, dir, to string) error {
	output, err := outputOf(cmd)
	if err != nil {
		return err
	}
	from := filepath.Join(dir, coordinator.StoreFile)
	if _, err := os.Stat(from); errors.Is(err, fs.ErrNotExist) {
		return usageError{fmt.Errorf("there is no database in %s: name a coordinator's data folder with --data-dir; one with --store postgres://… is backed up by pg_dump", dir)}
	}
	if _, err := os.Lstat(to); err == nil {
		return usageError{fmt.Errorf("%s is there already: name a new file", to)}
	}
	if err := sqlite.Backup(cmd.Context(), from, to); err != nil {
		return err
	}
	info, err := os.Stat(to)
	if err != nil {
		return fmt.Errorf("backing up %s: %w", from, err)
	}
	if output == "json" {
		return printJSON(cmd.OutOrStdout(), backupJSON{to, info.Size()})
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", to, bytesText(info.Size()))
	return err
}
