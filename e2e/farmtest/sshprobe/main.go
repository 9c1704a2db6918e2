// Command sshprobe runs in a RUN step with a forwarded ssh agent: it asks the agent for its keys, has it sign, checks
// the signature, and prints each key's fingerprint. An image FROM scratch has no ssh-add.
package main

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

func main() {
	if err := probe(os.Getenv("SSH_AUTH_SOCK")); err != nil {
		fmt.Fprintln(os.Stderr, "sshprobe:", err)
		os.Exit(1)
	}
}

func probe(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return fmt.Errorf("reaching the agent: %w", err)
	}
	defer conn.Close()
	client := agent.NewClient(conn)
	keys, err := client.List()
	if err != nil {
		return fmt.Errorf("listing the agent's keys: %w", err)
	}
	for _, key := range keys {
		data := []byte("archfarm")
		signature, err := client.Sign(key, data)
		if err != nil {
			return fmt.Errorf("signing with %s: %w", key.Comment, err)
		}
		if err := key.Verify(data, signature); err != nil {
			return fmt.Errorf("checking the agent's signature: %w", err)
		}
		fmt.Println(ssh.FingerprintSHA256(key))
	}
	return nil
}
