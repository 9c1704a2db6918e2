-- The build history: records of builds at the endpoint, and the blobs that they name.

CREATE TABLE builds (
	ref TEXT COLLATE "C" PRIMARY KEY,
	tenant TEXT COLLATE "C" NOT NULL,
	record BYTEA,
	extent BYTEA,
	pinned BOOLEAN NOT NULL,
	completed BIGINT NOT NULL,
	size BIGINT NOT NULL -- with its blobs
);

CREATE TABLE build_blobs (
	digest TEXT COLLATE "C" PRIMARY KEY,
	size BIGINT NOT NULL,
	complete BOOLEAN NOT NULL -- all chunks are there
);

CREATE TABLE build_chunks (
	digest TEXT COLLATE "C" NOT NULL REFERENCES build_blobs (digest) ON DELETE CASCADE,
	num BIGINT NOT NULL, -- from 0
	data BYTEA NOT NULL,
	PRIMARY KEY (digest, num)
);

-- Which records name which blobs.
CREATE TABLE build_names (
	ref TEXT COLLATE "C" NOT NULL REFERENCES builds (ref) ON DELETE CASCADE,
	digest TEXT COLLATE "C" NOT NULL REFERENCES build_blobs (digest),
	PRIMARY KEY (ref, digest)
);
CREATE INDEX build_names_digest ON build_names (digest);

-- Which blobs are kept though no record names them yet.
CREATE TABLE build_holds (
	holder TEXT COLLATE "C" NOT NULL,
	digest TEXT COLLATE "C" NOT NULL REFERENCES build_blobs (digest) ON DELETE CASCADE,
	until BIGINT NOT NULL,
	PRIMARY KEY (holder, digest)
);
CREATE INDEX build_holds_digest ON build_holds (digest, until);

-- Which workers have what else records name.
CREATE TABLE build_places (
	ref TEXT COLLATE "C" NOT NULL REFERENCES builds (ref) ON DELETE CASCADE,
	digest TEXT COLLATE "C" NOT NULL,
	worker TEXT COLLATE "C" NOT NULL,
	PRIMARY KEY (ref, digest, worker)
);
CREATE INDEX build_places_digest ON build_places (digest, worker);
