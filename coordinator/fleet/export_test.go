package fleet

// Confidential is confidential, for tests.
var Confidential = confidential
