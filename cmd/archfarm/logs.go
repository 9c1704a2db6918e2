package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/coordinator/progress"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func newLogs() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "logs JOB",
		Short: "Print what a job's steps have written",
		Long: `Print what the steps of a job have written, in the order in which it came, under the
steps' names. With --output json it is one object a line: {"seq", "time", "platform",
"attempt", "step", "stream", "text"}.`,
		Example: `  archfarm logs 01a20ae6-d469-7d03-9fcf-659b63e32bea
  archfarm logs 01a20ae6-d469 --platform linux/arm64 --follow
  archfarm logs 01a20ae6-d469 --output json | jq 'select(.stream == "stderr") | .text'`,
		Args:              oneArg("the job's id, as archfarm jobs shows it"),
		ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			platforms, err := platformsOf(cmd)
			if err != nil {
				return err
			}
			follow, _ := cmd.Flags().GetBool("follow")
			return withFarm(cmd, "reading the logs of job "+args[0], func(ctx context.Context, farm *client.Client) error {
				job, err := farm.Get(ctx, args[0])
				if err != nil {
					return err
				}
				printer := &logPrinter{out: cmd.OutOrStdout(), json: output == "json", platforms: platforms, names: map[string]string{}}
				return printer.run(ctx, farm, job, follow)
			})
		},
	}
	flags := cmd.Flags()
	flags.StringSlice("platform", nil, "only what was written for this platform; may repeat")
	flags.Bool("follow", false, "go on with what will be written, until the job has ended")
	outputFlag(flags)
	farmFlags(flags)
	_ = cmd.RegisterFlagCompletionFunc("platform", completePlatforms) // fails only for flags that are none
	return cmd
}

// platformsOf are those of --platform, as the farm writes them.
func platformsOf(cmd *cobra.Command) ([]string, error) {
	names, _ := cmd.Flags().GetStringSlice("platform")
	var out []string
	for _, name := range names {
		p, err := parsePlatform(strings.TrimSpace(name))
		if err != nil {
			return nil, usageError{fmt.Errorf("--platform: %w", err)}
		}
		out = append(out, p)
	}
	return out, nil
}

// logPrinter prints the output of steps.
type logPrinter struct {
	out       io.Writer
	json      bool
	platforms []string // none: all

	names   map[string]string // of vertices, by their digests
	step    string            // whose output was printed last
	unended bool              // the last line
}

// logJSON is a piece of output, as --output json prints it.
type logJSON struct {
	Seq      int64      `json:"seq"`
	Time     *time.Time `json:"time,omitempty"`
	Platform string     `json:"platform"`
	Attempt  int32      `json:"attempt"`
	Step     string     `json:"step"`
	Stream   string     `json:"stream"`
	Text     string     `json:"text"`
}

// run prints what there is, or, following, what will be, too.
func (l *logPrinter) run(ctx context.Context, farm *client.Client, job *archfarmv1.Job, follow bool) error {
	if !follow && job.GetLastSeq() == 0 {
		return nil
	}
	for event, err := range farm.Watch(ctx, job.GetId(), 0) {
		if err != nil {
			return err
		}
		if p := event.GetProgress(); p != nil && (len(l.platforms) == 0 || slices.Contains(l.platforms, p.GetPlatform())) {
			if err := l.print(event.GetSeq(), p); err != nil {
				return err
			}
		}
		if !follow && event.GetSeq() >= job.GetLastSeq() {
			break
		}
	}
	return l.endLine()
}

func (l *logPrinter) print(seq int64, p *archfarmv1.Progress) error {
	for _, v := range p.GetVertexes() {
		l.names[v.GetDigest()] = printable(progress.StepName(p.GetPlatform(), v.GetName()))
	}
	for _, piece := range p.GetLogs() {
		var err error
		if l.json {
			err = l.asJSON(seq, p, piece)
		} else {
			err = l.asText(p.GetAttempt(), piece)
		}
		if err != nil {
			return err
		}
	}
	for _, v := range p.GetVertexes() {
		if v.GetError() != "" && v.GetCompleted() != nil && !l.json {
			if err := l.asText(p.GetAttempt(), &archfarmv1.VertexLog{Vertex: v.GetDigest(), Msg: []byte("ERROR: " + v.GetError() + "\n")}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *logPrinter) asText(attempt int32, piece *archfarmv1.VertexLog) error {
	step := fmt.Sprint(piece.GetVertex(), attempt)
	if step != l.step {
		if err := l.endLine(); err != nil {
			return err
		}
		heading := l.names[piece.GetVertex()]
		if attempt > 1 {
			heading += fmt.Sprintf(" (attempt %d)", attempt)
		}
		if _, err := fmt.Fprintf(l.out, "=== %s\n", heading); err != nil {
			return err
		}
		l.step = step
	}
	if len(piece.GetMsg()) > 0 {
		l.unended = !bytes.HasSuffix(piece.GetMsg(), []byte("\n"))
	}
	_, err := l.out.Write(piece.GetMsg())
	return err
}

func (l *logPrinter) endLine() error {
	if !l.unended {
		return nil
	}
	l.unended = false
	_, err := io.WriteString(l.out, "\n")
	return err
}

func (l *logPrinter) asJSON(seq int64, p *archfarmv1.Progress, piece *archfarmv1.VertexLog) error {
	stream := "stdout"
	if piece.GetStream() == 2 {
		stream = "stderr"
	}
	return json.NewEncoder(l.out).Encode(logJSON{
		Seq: seq, Time: timeOf(piece.GetTimestamp()), Platform: p.GetPlatform(), Attempt: p.GetAttempt(), Step: l.names[piece.GetVertex()], Stream: stream, Text: string(piece.GetMsg()),
	})
}
