-- Jobs with their events, the ledger of tags, secrets.
-- Times are microseconds since 1970, 0 for none.

CREATE TABLE jobs (
	id TEXT PRIMARY KEY, -- sorts by the time of creation
	request_id TEXT NOT NULL,
	tenant TEXT NOT NULL,
	submitted_by TEXT NOT NULL,
	pools TEXT NOT NULL, -- JSON, as tags, repositories and legs; empty for none
	spec BLOB,
	spec_digest TEXT NOT NULL,
	sealed BLOB,
	context TEXT NOT NULL,
	tags TEXT NOT NULL,
	repositories TEXT NOT NULL,
	priority INTEGER NOT NULL,
	state TEXT NOT NULL,
	digest TEXT NOT NULL DEFAULT '',
	error TEXT NOT NULL DEFAULT '',
	retries INTEGER NOT NULL DEFAULT 0,
	cancel_requested BOOLEAN NOT NULL DEFAULT FALSE,
	coordinator TEXT NOT NULL DEFAULT '',
	last_seq INTEGER NOT NULL,
	created INTEGER NOT NULL,
	started INTEGER NOT NULL DEFAULT 0,
	ended INTEGER NOT NULL DEFAULT 0,
	legs TEXT NOT NULL,
	epoch INTEGER NOT NULL DEFAULT 0,
	lease_until INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX jobs_request ON jobs (tenant, request_id) WHERE request_id <> '';
-- Lists: by state, by tenant and state. Claims: without the lease, which changes often.
CREATE INDEX jobs_state ON jobs (state, id);
CREATE INDEX jobs_tenant ON jobs (tenant, state, id);
CREATE INDEX jobs_open ON jobs (priority DESC, id) WHERE ended = 0;
CREATE INDEX jobs_ended ON jobs (ended) WHERE ended > 0;
CREATE INDEX jobs_context ON jobs (tenant, context, state) WHERE context <> '';

-- The state is the job's: lists of a repository by state walk over nothing else.
CREATE TABLE job_repositories (
	repository TEXT NOT NULL,
	state TEXT NOT NULL,
	job TEXT NOT NULL,
	tenant TEXT NOT NULL,
	PRIMARY KEY (repository, state, job)
) WITHOUT ROWID;

CREATE TABLE job_events (
	job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
	seq INTEGER NOT NULL,
	time INTEGER NOT NULL,
	data BLOB,
	PRIMARY KEY (job, seq)
);

CREATE TABLE publications (
	num INTEGER PRIMARY KEY AUTOINCREMENT,
	id TEXT NOT NULL UNIQUE,
	tenant TEXT NOT NULL,
	job TEXT NOT NULL,
	build TEXT NOT NULL,
	digest TEXT NOT NULL,
	media_type TEXT NOT NULL,
	blob BLOB,
	insecure BOOLEAN NOT NULL,
	source TEXT NOT NULL, -- JSON
	created INTEGER NOT NULL,
	pending INTEGER NOT NULL, -- bindings
	owner TEXT NOT NULL DEFAULT '',
	epoch INTEGER NOT NULL DEFAULT 0,
	lease_until INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX publications_job ON publications (job, num) WHERE job <> '';
CREATE INDEX publications_pending ON publications (num) WHERE pending > 0;

CREATE TABLE bindings (
	id INTEGER PRIMARY KEY AUTOINCREMENT,
	publication TEXT NOT NULL REFERENCES publications (id),
	repository TEXT NOT NULL,
	tag TEXT NOT NULL,
	digest TEXT NOT NULL,
	immutable BOOLEAN NOT NULL,
	state TEXT NOT NULL,
	bound INTEGER NOT NULL,
	ended INTEGER NOT NULL DEFAULT 0,
	job TEXT NOT NULL,
	build TEXT NOT NULL,
	tenant TEXT NOT NULL,
	source TEXT NOT NULL -- JSON
);
CREATE INDEX bindings_publication ON bindings (publication);
CREATE INDEX bindings_repository ON bindings (repository, id);
CREATE INDEX bindings_tag ON bindings (repository, tag, id);
CREATE UNIQUE INDEX bindings_pending ON bindings (repository, tag) WHERE state = 'pending';
CREATE INDEX bindings_published ON bindings (repository, tag, id) WHERE state = 'published';

CREATE TABLE secrets (
	tenant TEXT NOT NULL,
	name TEXT NOT NULL,
	sealed BLOB,
	updated INTEGER NOT NULL,
	PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
