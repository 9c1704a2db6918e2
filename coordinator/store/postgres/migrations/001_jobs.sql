-- Jobs with their events, the ledger of tags, secrets.
-- Times are microseconds since 1970, 0 for none. What is looked for or sorted by is
-- compared byte by byte.

CREATE TABLE jobs (
	id TEXT COLLATE "C" PRIMARY KEY, -- sorts by the time of creation
	request_id TEXT COLLATE "C" NOT NULL,
	tenant TEXT COLLATE "C" NOT NULL,
	submitted_by TEXT NOT NULL,
	pools TEXT NOT NULL, -- JSON, as tags, repositories and legs; empty for none
	spec BYTEA,
	spec_digest TEXT NOT NULL,
	sealed BYTEA,
	context TEXT COLLATE "C" NOT NULL,
	tags TEXT NOT NULL,
	repositories TEXT NOT NULL,
	priority INTEGER NOT NULL,
	state TEXT COLLATE "C" NOT NULL,
	digest TEXT NOT NULL DEFAULT '',
	error TEXT NOT NULL DEFAULT '',
	retries INTEGER NOT NULL DEFAULT 0,
	cancel_requested BOOLEAN NOT NULL DEFAULT FALSE,
	coordinator TEXT NOT NULL DEFAULT '',
	last_seq BIGINT NOT NULL,
	created BIGINT NOT NULL,
	started BIGINT NOT NULL DEFAULT 0,
	ended BIGINT NOT NULL DEFAULT 0,
	legs TEXT NOT NULL,
	epoch BIGINT NOT NULL DEFAULT 0,
	lease_until BIGINT NOT NULL DEFAULT 0
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
	repository TEXT COLLATE "C" NOT NULL,
	state TEXT COLLATE "C" NOT NULL,
	job TEXT COLLATE "C" NOT NULL,
	tenant TEXT COLLATE "C" NOT NULL,
	PRIMARY KEY (repository, state, job) INCLUDE (tenant)
);

CREATE TABLE job_events (
	job TEXT COLLATE "C" NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
	seq BIGINT NOT NULL,
	time BIGINT NOT NULL,
	data BYTEA,
	PRIMARY KEY (job, seq)
);

CREATE TABLE publications (
	num BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	id TEXT COLLATE "C" NOT NULL UNIQUE,
	tenant TEXT COLLATE "C" NOT NULL,
	job TEXT COLLATE "C" NOT NULL,
	build TEXT NOT NULL,
	digest TEXT COLLATE "C" NOT NULL,
	media_type TEXT NOT NULL,
	blob BYTEA,
	insecure BOOLEAN NOT NULL,
	source TEXT NOT NULL, -- JSON
	created BIGINT NOT NULL,
	pending INTEGER NOT NULL, -- bindings
	owner TEXT NOT NULL DEFAULT '',
	epoch BIGINT NOT NULL DEFAULT 0,
	lease_until BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX publications_job ON publications (job, num) WHERE job <> '';
CREATE INDEX publications_pending ON publications (num) WHERE pending > 0;

CREATE TABLE bindings (
	id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	publication TEXT COLLATE "C" NOT NULL REFERENCES publications (id),
	repository TEXT COLLATE "C" NOT NULL,
	tag TEXT COLLATE "C" NOT NULL,
	digest TEXT COLLATE "C" NOT NULL,
	immutable BOOLEAN NOT NULL,
	state TEXT COLLATE "C" NOT NULL,
	bound BIGINT NOT NULL,
	ended BIGINT NOT NULL DEFAULT 0,
	job TEXT COLLATE "C" NOT NULL,
	build TEXT NOT NULL,
	tenant TEXT COLLATE "C" NOT NULL,
	source TEXT NOT NULL -- JSON
);
CREATE INDEX bindings_publication ON bindings (publication);
CREATE INDEX bindings_repository ON bindings (repository, id);
CREATE INDEX bindings_tag ON bindings (repository, tag, id);
CREATE UNIQUE INDEX bindings_pending ON bindings (repository, tag) WHERE state = 'pending';
CREATE INDEX bindings_published ON bindings (repository, tag, id) WHERE state = 'published';

CREATE TABLE secrets (
	tenant TEXT COLLATE "C" NOT NULL,
	name TEXT COLLATE "C" NOT NULL,
	sealed BYTEA,
	updated BIGINT NOT NULL,
	PRIMARY KEY (tenant, name)
);

-- The bytes are chunks of archives, mostly compressed: they are stored as they are.
CREATE TABLE blobs (
	tenant TEXT COLLATE "C" NOT NULL,
	digest TEXT COLLATE "C" NOT NULL,
	data BYTEA NOT NULL,
	used BIGINT NOT NULL, -- last put or asked for
	PRIMARY KEY (tenant, digest)
);
ALTER TABLE blobs ALTER COLUMN data SET STORAGE EXTERNAL;
