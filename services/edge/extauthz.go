package edge

import "google.golang.org/grpc"

func (s *Service) newGRPC() *grpc.Server { return grpc.NewServer() }
