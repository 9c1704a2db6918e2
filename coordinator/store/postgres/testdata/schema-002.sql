--
-- PostgreSQL database dump
--



SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: bindings; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.bindings (
    id bigint NOT NULL,
    publication text NOT NULL COLLATE pg_catalog."C",
    repository text NOT NULL COLLATE pg_catalog."C",
    tag text NOT NULL COLLATE pg_catalog."C",
    digest text NOT NULL COLLATE pg_catalog."C",
    immutable boolean NOT NULL,
    state text NOT NULL COLLATE pg_catalog."C",
    bound bigint NOT NULL,
    ended bigint DEFAULT 0 NOT NULL,
    job text NOT NULL COLLATE pg_catalog."C",
    build text NOT NULL,
    tenant text NOT NULL COLLATE pg_catalog."C",
    source text NOT NULL
);


--
-- Name: bindings_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

ALTER TABLE public.bindings ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.bindings_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: blobs; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.blobs (
    tenant text NOT NULL COLLATE pg_catalog."C",
    digest text NOT NULL COLLATE pg_catalog."C",
    data bytea NOT NULL,
    used bigint NOT NULL
);
ALTER TABLE ONLY public.blobs ALTER COLUMN data SET STORAGE EXTERNAL;


--
-- Name: build_blobs; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.build_blobs (
    digest text NOT NULL COLLATE pg_catalog."C",
    size bigint NOT NULL,
    complete boolean NOT NULL
);


--
-- Name: build_chunks; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.build_chunks (
    digest text NOT NULL COLLATE pg_catalog."C",
    num bigint NOT NULL,
    data bytea NOT NULL
);


--
-- Name: build_holds; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.build_holds (
    holder text NOT NULL COLLATE pg_catalog."C",
    digest text NOT NULL COLLATE pg_catalog."C",
    until bigint NOT NULL
);


--
-- Name: build_names; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.build_names (
    ref text NOT NULL COLLATE pg_catalog."C",
    digest text NOT NULL COLLATE pg_catalog."C"
);


--
-- Name: build_places; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.build_places (
    ref text NOT NULL COLLATE pg_catalog."C",
    digest text NOT NULL COLLATE pg_catalog."C",
    worker text NOT NULL COLLATE pg_catalog."C"
);


--
-- Name: builds; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.builds (
    ref text NOT NULL COLLATE pg_catalog."C",
    tenant text NOT NULL COLLATE pg_catalog."C",
    record bytea,
    extent bytea,
    pinned boolean NOT NULL,
    completed bigint NOT NULL,
    size bigint NOT NULL
);


--
-- Name: job_events; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.job_events (
    job text NOT NULL COLLATE pg_catalog."C",
    seq bigint NOT NULL,
    "time" bigint NOT NULL,
    data bytea
);


--
-- Name: job_repositories; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.job_repositories (
    repository text NOT NULL COLLATE pg_catalog."C",
    state text NOT NULL COLLATE pg_catalog."C",
    job text NOT NULL COLLATE pg_catalog."C",
    tenant text NOT NULL COLLATE pg_catalog."C"
);


--
-- Name: jobs; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.jobs (
    id text NOT NULL COLLATE pg_catalog."C",
    request_id text NOT NULL COLLATE pg_catalog."C",
    tenant text NOT NULL COLLATE pg_catalog."C",
    submitted_by text NOT NULL,
    pools text NOT NULL,
    spec bytea,
    spec_digest text NOT NULL,
    sealed bytea,
    context text NOT NULL COLLATE pg_catalog."C",
    tags text NOT NULL,
    repositories text NOT NULL,
    priority integer NOT NULL,
    state text NOT NULL COLLATE pg_catalog."C",
    digest text DEFAULT ''::text NOT NULL,
    error text DEFAULT ''::text NOT NULL,
    retries integer DEFAULT 0 NOT NULL,
    cancel_requested boolean DEFAULT false NOT NULL,
    coordinator text DEFAULT ''::text NOT NULL,
    last_seq bigint NOT NULL,
    created bigint NOT NULL,
    started bigint DEFAULT 0 NOT NULL,
    ended bigint DEFAULT 0 NOT NULL,
    legs text NOT NULL,
    epoch bigint DEFAULT 0 NOT NULL,
    lease_until bigint DEFAULT 0 NOT NULL
);


--
-- Name: publications; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.publications (
    num bigint NOT NULL,
    id text NOT NULL COLLATE pg_catalog."C",
    tenant text NOT NULL COLLATE pg_catalog."C",
    job text NOT NULL COLLATE pg_catalog."C",
    build text NOT NULL,
    digest text NOT NULL COLLATE pg_catalog."C",
    media_type text NOT NULL,
    blob bytea,
    insecure boolean NOT NULL,
    source text NOT NULL,
    created bigint NOT NULL,
    pending integer NOT NULL,
    owner text DEFAULT ''::text NOT NULL,
    epoch bigint DEFAULT 0 NOT NULL,
    lease_until bigint DEFAULT 0 NOT NULL
);


--
-- Name: publications_num_seq; Type: SEQUENCE; Schema: public; Owner: -
--

ALTER TABLE public.publications ALTER COLUMN num ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME public.publications_num_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);


--
-- Name: schema_migrations; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.schema_migrations (
    version integer NOT NULL,
    name text NOT NULL,
    hash text NOT NULL,
    applied bigint NOT NULL
);


--
-- Name: secrets; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.secrets (
    tenant text NOT NULL COLLATE pg_catalog."C",
    name text NOT NULL COLLATE pg_catalog."C",
    sealed bytea,
    updated bigint NOT NULL
);


--
-- Data for Name: bindings; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) OVERRIDING SYSTEM VALUE VALUES (1, 'published', 'registry.example/app', 'v1', 'sha256:published', true, 'published', 1795479635893467, 1795479635904874, 'job of published', '', 'acme', '{"url":"https://git.example/app","commit":"cpublished","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO public.bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) OVERRIDING SYSTEM VALUE VALUES (2, 'published', 'registry.example/app', 'latest', 'sha256:published', false, 'published', 1795479635893467, 1795479635904874, 'job of published', '', 'acme', '{"url":"https://git.example/app","commit":"cpublished","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO public.bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) OVERRIDING SYSTEM VALUE VALUES (3, 'undone', 'registry.example/app', 'v1', 'sha256:undone', true, 'undone', 1795479635908172, 1795479635920445, 'job of undone', '', 'acme', '{"url":"https://git.example/app","commit":"cundone","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO public.bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) OVERRIDING SYSTEM VALUE VALUES (4, 'undone', 'registry.example/app', 'latest', 'sha256:undone', false, 'undone', 1795479635908172, 1795479635920445, 'job of undone', '', 'acme', '{"url":"https://git.example/app","commit":"cundone","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO public.bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) OVERRIDING SYSTEM VALUE VALUES (5, 'pending', 'registry.example/app', 'v1', 'sha256:pending', true, 'pending', 1795479635935799, 0, 'job of pending', '', 'acme', '{"url":"https://git.example/app","commit":"cpending","branch":"main","tag":"v1","commit_time":1777635000123456}');
INSERT INTO public.bindings (id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source) OVERRIDING SYSTEM VALUE VALUES (6, 'pending', 'registry.example/app', 'latest', 'sha256:pending', false, 'pending', 1795479635935799, 0, 'job of pending', '', 'acme', '{"url":"https://git.example/app","commit":"cpending","branch":"main","tag":"v1","commit_time":1777635000123456}');


--
-- Data for Name: blobs; Type: TABLE DATA; Schema: public; Owner: -
--



--
-- Data for Name: build_blobs; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.build_blobs (digest, size, complete) VALUES ('sha256:1f6e770915fae7260dbd2de9608785105a1b068850b77e73f4cdeb667d6aaada', 11, true);
INSERT INTO public.build_blobs (digest, size, complete) VALUES ('sha256:c20dea4d876b5b8fb0a1814b43017030cea6d4ac30b2d9ae71b404d2faba49b5', 4, true);


--
-- Data for Name: build_chunks; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.build_chunks (digest, num, data) VALUES ('sha256:1f6e770915fae7260dbd2de9608785105a1b068850b77e73f4cdeb667d6aaada', 0, '\x69742773002061206c6f67');
INSERT INTO public.build_chunks (digest, num, data) VALUES ('sha256:c20dea4d876b5b8fb0a1814b43017030cea6d4ac30b2d9ae71b404d2faba49b5', 0, '\x68656c64');


--
-- Data for Name: build_holds; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.build_holds (holder, digest, until) VALUES ('holder', 'sha256:1f6e770915fae7260dbd2de9608785105a1b068850b77e73f4cdeb667d6aaada', 1795483235944226);
INSERT INTO public.build_holds (holder, digest, until) VALUES ('holder', 'sha256:c20dea4d876b5b8fb0a1814b43017030cea6d4ac30b2d9ae71b404d2faba49b5', 1795483235964684);


--
-- Data for Name: build_names; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.build_names (ref, digest) VALUES ('build', 'sha256:1f6e770915fae7260dbd2de9608785105a1b068850b77e73f4cdeb667d6aaada');


--
-- Data for Name: build_places; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.build_places (ref, digest, worker) VALUES ('build', 'sha256:dac1d7cfa95021764849fd102524e141488c5e3a90f861dbb5a12d9ac8584f85', 'w');


--
-- Data for Name: builds; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.builds (ref, tenant, record, extent, pinned, completed, size) VALUES ('build', 'acme', '\x7265636f7264206f66206275696c64', '\x00ff27', true, 1777638600123456, 7);


--
-- Data for Name: job_events; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-queued', 1, 1795479635800483, '\x6576656e742031206f662031');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-running', 1, 1795479635811088, '\x6576656e742031206f662031');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-running', 2, 1777638600123456, '\x00ff27');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-publishing', 1, 1795479635842256, '\x6576656e742031206f662031');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-publishing', 2, 1777638600123456, '\x00ff27');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-succeeded', 1, 1795479635856810, '\x6576656e742031206f662031');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-succeeded', 2, 1777638600123456, '\x00ff27');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-failed', 1, 1795479635868718, '\x6576656e742031206f662031');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-failed', 2, 1777638600123456, '\x00ff27');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-cancelled', 1, 1795479635878245, '\x6576656e742031206f662031');
INSERT INTO public.job_events (job, seq, "time", data) VALUES ('job-cancelled', 2, 1777638600123456, '\x00ff27');


--
-- Data for Name: job_repositories; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'queued', 'job-queued', 'acme');
INSERT INTO public.job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'running', 'job-running', 'acme');
INSERT INTO public.job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'publishing', 'job-publishing', 'acme');
INSERT INTO public.job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'succeeded', 'job-succeeded', 'acme');
INSERT INTO public.job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'failed', 'job-failed', 'acme');
INSERT INTO public.job_repositories (repository, state, job, tenant) VALUES ('registry.example/app', 'cancelled', 'job-cancelled', 'acme');


--
-- Data for Name: jobs; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-failed', 'request failed', 'acme', 'client ci', '["office"]', '\x73706563206f66206a6f622d6661696c6564', 'sha256:job-failed', '\x0001ff', 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'failed', 'sha256:d', 'it''s
a "text"; --', 0, false, 'farm-1', 2, 1777638600123456, 0, 1795479635874171, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 0);
INSERT INTO public.jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-running', 'request running', 'acme', 'client ci', '["office"]', '\x73706563206f66206a6f622d72756e6e696e67', 'sha256:job-running', '\x0001ff', 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'running', 'sha256:d', 'it''s
a "text"; --', 0, false, 'farm-1', 2, 1777638600123456, 1795479635837580, 0, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 1795483235826335);
INSERT INTO public.jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-publishing', 'request publishing', 'acme', 'client ci', '["office"]', '\x73706563206f66206a6f622d7075626c697368696e67', 'sha256:job-publishing', '\x0001ff', 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'publishing', 'sha256:d', 'it''s
a "text"; --', 0, false, 'farm-1', 2, 1777638600123456, 0, 0, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 1795483235848620);
INSERT INTO public.jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-cancelled', 'request cancelled', 'acme', 'client ci', '["office"]', '\x73706563206f66206a6f622d63616e63656c6c6564', 'sha256:job-cancelled', NULL, 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'cancelled', 'sha256:d', 'it''s
a "text"; --', 0, false, 'farm-1', 2, 1777638600123456, 0, 1795479635883456, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 0);
INSERT INTO public.jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-queued', 'request queued', 'acme', 'client ci', '["office"]', '\x73706563206f66206a6f622d717565756564', 'sha256:job-queued', '\x0001ff', 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'queued', '', '', 0, false, 'farm-1', 1, 1777638600123456, 0, 0, '[{"platform":"linux/amd64","state":"queued"},{"platform":"linux/arm64","state":"queued"}]', 5, 0);
INSERT INTO public.jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories, priority, state, digest, error, retries, cancel_requested, coordinator, last_seq, created, started, ended, legs, epoch, lease_until) VALUES ('job-succeeded', 'request succeeded', 'acme', 'client ci', '["office"]', '\x73706563206f66206a6f622d737563636565646564', 'sha256:job-succeeded', NULL, 'sha256:context', '["registry.example/app:1"]', '["registry.example/app"]', 3, 'succeeded', 'sha256:d', 'it''s
a "text"; --', 0, false, 'farm-1', 2, 1777638600123456, 0, 1795479635864196, '[{"platform":"linux/amd64","state":"succeeded","descriptor":"eyJzaXplIjoxfQ==","worker":"w","attempts":[{"number":1,"coordinator":"farm-1","worker":"w","began":1777638600123456,"ended":1777638660123456}]},{"platform":"linux/arm64","state":"queued"}]', 1, 0);


--
-- Data for Name: publications; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.publications (num, id, tenant, job, build, digest, media_type, blob, insecure, source, created, pending, owner, epoch, lease_until) OVERRIDING SYSTEM VALUE VALUES (1, 'published', 'acme', 'job of published', '', 'sha256:published', 'application/vnd.oci.image.index.v1+json', NULL, true, '{"url":"https://git.example/app","commit":"cpublished","branch":"main","tag":"v1","commit_time":1777635000123456}', 1777638600123456, 0, 'farm-1', 2, 0);
INSERT INTO public.publications (num, id, tenant, job, build, digest, media_type, blob, insecure, source, created, pending, owner, epoch, lease_until) OVERRIDING SYSTEM VALUE VALUES (2, 'undone', 'acme', 'job of undone', '', 'sha256:undone', 'application/vnd.oci.image.index.v1+json', NULL, true, '{"url":"https://git.example/app","commit":"cundone","branch":"main","tag":"v1","commit_time":1777635000123456}', 1777638600123456, 0, 'farm-1', 2, 0);
INSERT INTO public.publications (num, id, tenant, job, build, digest, media_type, blob, insecure, source, created, pending, owner, epoch, lease_until) OVERRIDING SYSTEM VALUE VALUES (3, 'pending', 'acme', 'job of pending', '', 'sha256:pending', 'application/vnd.oci.image.index.v1+json', '\x7b70656e64696e677d', true, '{"url":"https://git.example/app","commit":"cpending","branch":"main","tag":"v1","commit_time":1777635000123456}', 1777638600123456, 2, 'farm-1', 1, 1795479634939800);


--
-- Data for Name: schema_migrations; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.schema_migrations (version, name, hash, applied) VALUES (1, '001_jobs.sql', '2d459e43acfa5571ee1d934bb1bc506c34ef5822a045acbb7a464d7aafb51722', 1795479635731760);
INSERT INTO public.schema_migrations (version, name, hash, applied) VALUES (2, '002_history.sql', 'db0078c91e6da3272be6195f72d9154c51e14eb1f5150c0dc63b376fd0bd9b6b', 1795479635791585);


--
-- Data for Name: secrets; Type: TABLE DATA; Schema: public; Owner: -
--

INSERT INTO public.secrets (tenant, name, sealed, updated) VALUES ('acme', 'npm', '\x010002', 1795479635940924);


--
-- Name: bindings_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.bindings_id_seq', 6, true);


--
-- Name: publications_num_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.publications_num_seq', 3, true);


--
-- Name: bindings bindings_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.bindings
    ADD CONSTRAINT bindings_pkey PRIMARY KEY (id);


--
-- Name: blobs blobs_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blobs
    ADD CONSTRAINT blobs_pkey PRIMARY KEY (tenant, digest);


--
-- Name: build_blobs build_blobs_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_blobs
    ADD CONSTRAINT build_blobs_pkey PRIMARY KEY (digest);


--
-- Name: build_chunks build_chunks_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_chunks
    ADD CONSTRAINT build_chunks_pkey PRIMARY KEY (digest, num);


--
-- Name: build_holds build_holds_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_holds
    ADD CONSTRAINT build_holds_pkey PRIMARY KEY (holder, digest);


--
-- Name: build_names build_names_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_names
    ADD CONSTRAINT build_names_pkey PRIMARY KEY (ref, digest);


--
-- Name: build_places build_places_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_places
    ADD CONSTRAINT build_places_pkey PRIMARY KEY (ref, digest, worker);


--
-- Name: builds builds_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.builds
    ADD CONSTRAINT builds_pkey PRIMARY KEY (ref);


--
-- Name: job_events job_events_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_events
    ADD CONSTRAINT job_events_pkey PRIMARY KEY (job, seq);


--
-- Name: job_repositories job_repositories_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_repositories
    ADD CONSTRAINT job_repositories_pkey PRIMARY KEY (repository, state, job) INCLUDE (tenant);


--
-- Name: jobs jobs_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_pkey PRIMARY KEY (id);


--
-- Name: publications publications_id_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.publications
    ADD CONSTRAINT publications_id_key UNIQUE (id);


--
-- Name: publications publications_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.publications
    ADD CONSTRAINT publications_pkey PRIMARY KEY (num);


--
-- Name: schema_migrations schema_migrations_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.schema_migrations
    ADD CONSTRAINT schema_migrations_pkey PRIMARY KEY (version);


--
-- Name: secrets secrets_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.secrets
    ADD CONSTRAINT secrets_pkey PRIMARY KEY (tenant, name);


--
-- Name: bindings_pending; Type: INDEX; Schema: public; Owner: -
--

CREATE UNIQUE INDEX bindings_pending ON public.bindings USING btree (repository, tag) WHERE (state = 'pending'::text);


--
-- Name: bindings_publication; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX bindings_publication ON public.bindings USING btree (publication);


--
-- Name: bindings_published; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX bindings_published ON public.bindings USING btree (repository, tag, id) WHERE (state = 'published'::text);


--
-- Name: bindings_repository; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX bindings_repository ON public.bindings USING btree (repository, id);


--
-- Name: bindings_tag; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX bindings_tag ON public.bindings USING btree (repository, tag, id);


--
-- Name: build_holds_digest; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX build_holds_digest ON public.build_holds USING btree (digest, until);


--
-- Name: build_names_digest; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX build_names_digest ON public.build_names USING btree (digest);


--
-- Name: build_places_digest; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX build_places_digest ON public.build_places USING btree (digest, worker);


--
-- Name: jobs_context; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX jobs_context ON public.jobs USING btree (tenant, context, state) WHERE (context <> ''::text);


--
-- Name: jobs_ended; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX jobs_ended ON public.jobs USING btree (ended) WHERE (ended > 0);


--
-- Name: jobs_open; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX jobs_open ON public.jobs USING btree (priority DESC, id) WHERE (ended = 0);


--
-- Name: jobs_request; Type: INDEX; Schema: public; Owner: -
--

CREATE UNIQUE INDEX jobs_request ON public.jobs USING btree (tenant, request_id) WHERE (request_id <> ''::text);


--
-- Name: jobs_state; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX jobs_state ON public.jobs USING btree (state, id);


--
-- Name: jobs_tenant; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX jobs_tenant ON public.jobs USING btree (tenant, state, id);


--
-- Name: publications_job; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX publications_job ON public.publications USING btree (job, num) WHERE (job <> ''::text);


--
-- Name: publications_pending; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX publications_pending ON public.publications USING btree (num) WHERE (pending > 0);


--
-- Name: bindings bindings_publication_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.bindings
    ADD CONSTRAINT bindings_publication_fkey FOREIGN KEY (publication) REFERENCES public.publications(id);


--
-- Name: build_chunks build_chunks_digest_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_chunks
    ADD CONSTRAINT build_chunks_digest_fkey FOREIGN KEY (digest) REFERENCES public.build_blobs(digest) ON DELETE CASCADE;


--
-- Name: build_holds build_holds_digest_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_holds
    ADD CONSTRAINT build_holds_digest_fkey FOREIGN KEY (digest) REFERENCES public.build_blobs(digest) ON DELETE CASCADE;


--
-- Name: build_names build_names_digest_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_names
    ADD CONSTRAINT build_names_digest_fkey FOREIGN KEY (digest) REFERENCES public.build_blobs(digest);


--
-- Name: build_names build_names_ref_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_names
    ADD CONSTRAINT build_names_ref_fkey FOREIGN KEY (ref) REFERENCES public.builds(ref) ON DELETE CASCADE;


--
-- Name: build_places build_places_ref_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.build_places
    ADD CONSTRAINT build_places_ref_fkey FOREIGN KEY (ref) REFERENCES public.builds(ref) ON DELETE CASCADE;


--
-- Name: job_events job_events_job_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.job_events
    ADD CONSTRAINT job_events_job_fkey FOREIGN KEY (job) REFERENCES public.jobs(id) ON DELETE CASCADE;


--
-- PostgreSQL database dump complete
--


