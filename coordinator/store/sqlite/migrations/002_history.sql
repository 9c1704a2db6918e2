-- The build history: records of builds at the endpoint, and the blobs that they name.

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

-- Which records name which blobs.
CREATE TABLE build_names (
	ref TEXT NOT NULL REFERENCES builds (ref) ON DELETE CASCADE,
	digest TEXT NOT NULL REFERENCES build_blobs (digest),
	PRIMARY KEY (ref, digest)
) WITHOUT ROWID;
CREATE INDEX build_names_digest ON build_names (digest);

-- Which blobs are kept though no record names them yet.
CREATE TABLE build_holds (
	holder TEXT NOT NULL,
	digest TEXT NOT NULL REFERENCES build_blobs (digest) ON DELETE CASCADE,
	until INTEGER NOT NULL,
	PRIMARY KEY (holder, digest)
) WITHOUT ROWID;
CREATE INDEX build_holds_digest ON build_holds (digest, until);

-- Which workers have what else records name.
CREATE TABLE build_places (
	ref TEXT NOT NULL REFERENCES builds (ref) ON DELETE CASCADE,
	digest TEXT NOT NULL,
	worker TEXT NOT NULL,
	PRIMARY KEY (ref, digest, worker)
) WITHOUT ROWID;
CREATE INDEX build_places_digest ON build_places (digest, worker);
