CREATE TABLE schema_migrations (
			version INTEGER PRIMARY KEY,
			name TEXT NOT NULL,
			hash TEXT NOT NULL,
			applied BIGINT NOT NULL
		);
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
CREATE TABLE secrets (
	tenant TEXT NOT NULL,
	name TEXT NOT NULL,
	sealed BLOB,
	updated INTEGER NOT NULL,
	PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
CREATE TABLE builds (
	ref TEXT PRIMARY KEY,
	tenant TEXT NOT NULL,
	record BLOB,
	extent BLOB,
	pinned BOOLEAN NOT NULL,
	completed INTEGER NOT NULL,
	size INTEGER NOT NULL -- with its blobs
);
CREATE TABLE build_blobs (
	digest TEXT PRIMARY KEY,
	size INTEGER NOT NULL,
	complete BOOLEAN NOT NULL -- all chunks are there
);
CREATE TABLE build_chunks (
	digest TEXT NOT NULL REFERENCES build_blobs (digest) ON DELETE CASCADE,
	num INTEGER NOT NULL, -- from 0
	data BLOB NOT NULL,
	PRIMARY KEY (digest, num)
);
CREATE TABLE build_names (
	ref TEXT NOT NULL REFERENCES builds (ref) ON DELETE CASCADE,
	digest TEXT NOT NULL REFERENCES build_blobs (digest),
	PRIMARY KEY (ref, digest)
) WITHOUT ROWID;
CREATE TABLE build_holds (
	holder TEXT NOT NULL,
	digest TEXT NOT NULL REFERENCES build_blobs (digest) ON DELETE CASCADE,
	until INTEGER NOT NULL,
	PRIMARY KEY (holder, digest)
) WITHOUT ROWID;
CREATE TABLE build_places (
	ref TEXT NOT NULL REFERENCES builds (ref) ON DELETE CASCADE,
	digest TEXT NOT NULL,
	worker TEXT NOT NULL,
	PRIMARY KEY (ref, digest, worker)
) WITHOUT ROWID;
CREATE UNIQUE INDEX jobs_request ON jobs (tenant, request_id) WHERE request_id <> '';
CREATE INDEX jobs_state ON jobs (state, id);
CREATE INDEX jobs_tenant ON jobs (tenant, state, id);
CREATE INDEX jobs_open ON jobs (priority DESC, id) WHERE ended = 0;
CREATE INDEX jobs_ended ON jobs (ended) WHERE ended > 0;
CREATE INDEX jobs_context ON jobs (tenant, context, state) WHERE context <> '';
CREATE INDEX publications_job ON publications (job, num) WHERE job <> '';
CREATE INDEX publications_pending ON publications (num) WHERE pending > 0;
CREATE INDEX bindings_publication ON bindings (publication);
CREATE INDEX bindings_repository ON bindings (repository, id);
CREATE INDEX bindings_tag ON bindings (repository, tag, id);
CREATE UNIQUE INDEX bindings_pending ON bindings (repository, tag) WHERE state = 'pending';
CREATE INDEX bindings_published ON bindings (repository, tag, id) WHERE state = 'published';
CREATE INDEX build_names_digest ON build_names (digest);
CREATE INDEX build_holds_digest ON build_holds (digest, until);
CREATE INDEX build_places_digest ON build_places (digest, worker);
INSERT INTO schema_migrations (version, name, hash, applied) VALUES (1, '001_jobs.sql', '64db964ac69c099555e2feeab69122d219aebe21f374dc816d95f0a10f9859c0', 1795479629692428);
INSERT INTO schema_migrations (version, name, hash, applied) VALUES (2, '002_history.sql', '0bde292e883577eb1f778399611b5f8a5433c6d94c69c5034a81a12aed314aee', 1795479629696101);
INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-queued', 'request queued', 'acme', 'client ci', '["office"]', X'73706563206F66206A6F622D717565756564', 'sha256:job-queued', X'0001FF', 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'queued', '', '', 0, 0, 'farm-1', 1, 1777638600123456, 0, 0, '[{"platform":"linux/amd64","state":"queued"},{"platform":"linux/arm64","state":"queued"}]', 5, 0);
INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-running', 'request running', 'acme', 'client ci', '["office"]', X'73706563206F66206A6F622D72756E6E696E67', 'sha256:job-running', X'0001FF', 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'running', 'sha256:d', 'it''s
a "text"; --', 0, 0, 'farm-1', 2, 1777638600123456, 1795479629711539, 0, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 1795483229702162);
INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-publishing', 'request publishing', 'acme', 'client ci', '["office"]', X'73706563206F66206A6F622D7075626C697368696E67', 'sha256:job-publishing', X'0001FF', 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'publishing', 'sha256:d', 'it''s
a "text"; --', 0, 0, 'farm-1', 2, 1777638600123456, 0, 0, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 1795483229712896);
INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-succeeded', 'request succeeded', 'acme', 'client ci', '["office"]', X'73706563206F66206A6F622D737563636565646564', 'sha256:job-succeeded', NULL, 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'succeeded', 'sha256:d', 'it''s
a "text"; --', 0, 0, 'farm-1', 2, 1777638600123456, 0, 1795479629718055, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 0);
INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-failed', 'request failed', 'acme', 'client ci', '["office"]', X'73706563206F66206A6F622D6661696C6564', 'sha256:job-failed', X'0001FF', 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'failed', 'sha256:d', 'it''s
a "text"; --', 0, 0, 'farm-1', 2, 1777638600123456, 0, 1795479629720429, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 0);
INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-cancelled', 'request cancelled', 'acme', 'client ci', '["office"]', X'73706563206F66206A6F622D63616E63656C6C6564', 'sha256:job-cancelled', NULL, 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'cancelled', 'sha256:d', 'it''s
a "text"; --', 0, 0, 'farm-1', 2, 1777638600123456, 0, 1795479629725102, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 0);
INSERT INTO job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'cancelled', 'job-cancelled', 'acme');
INSERT INTO job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'failed', 'job-failed', 'acme');
INSERT INTO job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'publishing', 'job-publishing', 'acme');
INSERT INTO job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'queued', 'job-queued', 'acme');
INSERT INTO job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'running', 'job-running', 'acme');
INSERT INTO job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'succeeded', 'job-succeeded', 'acme');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-queued', 1, 1795479629696987, X'6576656E742031206F662031');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-running', 1, 1795479629699232, X'6576656E742031206F662031');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-running', 2, 1777638600123456, X'00FF27');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-publishing', 1, 1795479629712385, X'6576656E742031206F662031');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-publishing', 2, 1777638600123456, X'00FF27');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-succeeded', 1, 1795479629716374, X'6576656E742031206F662031');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-succeeded', 2, 1777638600123456, X'00FF27');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-failed', 1, 1795479629718573, X'6576656E742031206F662031');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-failed', 2, 1777638600123456, X'00FF27');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-cancelled', 1, 1795479629723302, X'6576656E742031206F662031');
INSERT INTO job_events (job, seq, time, data) VALUES ('job-cancelled', 2, 1777638600123456, X'00FF27');
INSERT INTO publications (num, id, tenant, job, build, digest, media_type, blob, insecure, source, created, pending, owner, epoch, lease_until) VALUES (1, 'published', 'acme', 'job of published', '', 'sha256:published', 'application/vnd.oci.image.index.v1+json', NULL, 1, '{"url":"https://git.example/app","commit":"cpublished","branch":"main","tag":"v1","commit_time":1777635000123456}', 1777638600123456, 0, 'farm-1', 2, 0);
INSERT INTO publications (num, id, tenant, job, build, digest, media_type, blob, insecure, source, created, pending, owner, epoch, lease_until) VALUES (2, 'undone', 'acme', 'job of undone', '', 'sha256:undone', 'application/vnd.oci.image.index.v1+json', NULL, 1, '{"url":"https://git.example/app","commit":"cundone","branch":"main","tag":"v1","commit_time":1777635000123456}', 1777638600123456, 0, 'farm-1', 2, 0);
INSERT INTO publications (num, id, tenant, job, build, digest, media_type, blob, insecure, source, created, pending, owner, epoch, lease_until) VALUES (3, 'pending', 'acme', 'job of pending', '', 'sha256:pending', 'application/vnd.oci.image.index.v1+json', X'7B70656E64696E677D', 1, '{"url":"https://git.example/app","commit":"cpending","branch":"main","tag":"v1","commit_time":1777635000123456}', 1777638600123456, 2, 'farm-1', 1, 1795479628740714);
INSERT INTO bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) VALUES (1, 'published', 'registry.example/app', 'v1', 'sha256:published', 1, 'published', 1795479629728024, 1795479629731305, 'job of published', '', 'acme', '{"url":"https://git.example/app","commit":"cpublished","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) VALUES (2, 'published', 'registry.example/app', 'latest', 'sha256:published', 0, 'published', 1795479629728024, 1795479629731305, 'job of published', '', 'acme', '{"url":"https://git.example/app","commit":"cpublished","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) VALUES (3, 'undone', 'registry.example/app', 'v1', 'sha256:undone', 1, 'undone', 1795479629735432, 1795479629736798, 'job of undone', '', 'acme', '{"url":"https://git.example/app","commit":"cundone","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) VALUES (4, 'undone', 'registry.example/app', 'latest', 'sha256:undone', 0, 'undone', 1795479629735432, 1795479629736798, 'job of undone', '', 'acme', '{"url":"https://git.example/app","commit":"cundone","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) VALUES (5, 'pending', 'registry.example/app', 'v1', 'sha256:pending', 1, 'pending', 1795479629740361, 0, 'job of pending', '', 'acme', '{"url":"https://git.example/app","commit":"cpending","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) VALUES (6, 'pending', 'registry.example/app', 'latest', 'sha256:pending', 0, 'pending', 1795479629740361, 0, 'job of pending', '', 'acme', '{"url":"https://git.example/app","commit":"cpending","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO secrets (tenant, name, sealed, updated) VALUES ('acme', 'npm', X'010002', 1795479629741545);
INSERT INTO builds (ref, tenant, record, extent, pinned, completed, size) VALUES ('build', 'acme', X'7265636F7264206F66206275696C64', X'00FF27', 1, 1777638600123456, 7);
INSERT INTO build_blobs (digest, size, complete) VALUES ('sha256:1f6e770915fae7260dbd2de9608785105a1b068850b77e73f4cdeb667d6aaada', 11, 1);
INSERT INTO build_blobs (digest, size, complete) VALUES ('sha256:c20dea4d876b5b8fb0a1814b43017030cea6d4ac30b2d9ae71b404d2faba49b5', 4, 1);
INSERT INTO build_chunks (digest, num, data) VALUES ('sha256:1f6e770915fae7260dbd2de9608785105a1b068850b77e73f4cdeb667d6aaada', 0, X'69742773002061206C6F67');
INSERT INTO build_chunks (digest, num, data) VALUES ('sha256:c20dea4d876b5b8fb0a1814b43017030cea6d4ac30b2d9ae71b404d2faba49b5', 0, X'68656C64');
INSERT INTO build_names (ref, digest) VALUES ('build', 'sha256:1f6e770915fae7260dbd2de9608785105a1b068850b77e73f4cdeb667d6aaada');
INSERT INTO build_holds (holder, digest, until) VALUES ('holder', 'sha256:1f6e770915fae7260dbd2de9608785105a1b068850b77e73f4cdeb667d6aaada', 1795483229744139);
INSERT INTO build_holds (holder, digest, until) VALUES ('holder', 'sha256:c20dea4d876b5b8fb0a1814b43017030cea6d4ac30b2d9ae71b404d2faba49b5', 1795483229748015);
INSERT INTO build_places (ref, digest, worker) VALUES ('build', 'sha256:dac1d7cfa95021764849fd102524e141488c5e3a90f861dbb5a12d9ac8584f85', 'w');
DELETE FROM sqlite_sequence;
INSERT INTO sqlite_sequence (name, seq) VALUES ('publications', 3);
INSERT INTO sqlite_sequence (name, seq) VALUES ('bindings', 6);
