package sqlstore

import (
	"context"
	"strings"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// skew is how much the order of ids and that of Created may differ, as the clocks of
// the coordinators do.
const skew = 10 * time.Minute

// maxBranches bounds a query of many tenants and states.
const maxBranches = 60

var allStates = []store.State{store.Queued, store.Running, store.Publishing, store.Succeeded, store.Failed, store.Cancelled}

// List returns jobs, the newest first.
func (s *Store) List(ctx context.Context, q store.Query) ([]store.Job, error) {
	q.Limit = page(q.Limit)
	if q.Tenants != nil && len(q.Tenants) == 0 {
		return nil, nil
	}
	return read(ctx, s, "listing jobs", func(tx Tx) ([]store.Job, error) {
		var found []store.Job
		for next := q; ; { // more than one page only where Since leaves some out
			query, p := listQuery(next)
			jobs, err := rows(tx, scanJob, query, p...)
			if err != nil {
				return nil, err
			}
			for _, j := range jobs {
				if !j.Created.Before(q.Since) && len(found) < q.Limit {
					found = append(found, j.Job)
				}
			}
			if len(found) == q.Limit || len(jobs) < q.Limit || jobs[len(jobs)-1].Created.Before(q.Since.Add(-skew)) {
				return found, nil
			}
			next.Before = jobs[len(jobs)-1].ID
		}
	})
}

// listQuery asks each index for its part of the page, in order, and joins the parts:
// a page is found without walking over jobs that are not on it.
func listQuery(q store.Query) (string, params) {
	var p params
	var parts []string
	states := q.States
	if len(states) == 0 {
		states = allStates
	}
	switch {
	case q.Repository != "":
		for _, state := range states {
			where := []string{"repository = " + p.add(text(q.Repository)), "state = " + p.add(string(state))}
			if q.Tenants != nil {
				where = append(where, in(&p, "tenant", texts(q.Tenants)))
			}
			parts = append(parts, listPart(&p, "job", "job_repositories", where, q))
		}
	case q.Tenants == nil && len(q.States) == 0:
		parts = append(parts, listPart(&p, "id", "jobs", nil, q))
	case q.Tenants == nil:
		for _, state := range states {
			parts = append(parts, listPart(&p, "id", "jobs", []string{"state = " + p.add(string(state))}, q))
		}
	case len(q.Tenants)*len(states) > maxBranches:
		parts = append(parts, listPart(&p, "id", "jobs", []string{in(&p, "tenant", texts(q.Tenants)), in(&p, "state", names(states))}, q))
	default:
		for _, tenant := range q.Tenants {
			for _, state := range states {
				parts = append(parts, listPart(&p, "id", "jobs", []string{"tenant = " + p.add(text(tenant)), "state = " + p.add(string(state))}, q))
			}
		}
	}
	ids := strings.Join(parts, " UNION ALL ")
	// CROSS: in this order.
	return "SELECT " + jobColumns + " FROM (SELECT DISTINCT page FROM (" + ids + ") AS parts ORDER BY page DESC LIMIT " + p.add(q.Limit) +
		") AS pages CROSS JOIN jobs WHERE jobs.id = page ORDER BY jobs.id DESC", p
}

func listPart(p *params, id, table string, where []string, q store.Query) string {
	if q.Before != "" {
		where = append(where, id+" < "+p.add(text(q.Before)))
	}
	query := "SELECT " + id + " AS page FROM " + table
	if len(where) > 0 {
		query += " WHERE " + strings.Join(where, " AND ")
	}
	return "SELECT page FROM (" + query + " ORDER BY " + id + " DESC LIMIT " + p.add(q.Limit) + ") AS part"
}

func texts(values []string) []string {
	clean := make([]string, len(values))
	for i, v := range values {
		clean[i] = text(v)
	}
	return clean
}

func names(states []store.State) []string {
	all := make([]string, len(states))
	for i, s := range states {
		all[i] = string(s)
	}
	return all
}
