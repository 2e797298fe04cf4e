#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "native/pool.h"
#include "linear/panels.h"
using namespace retinar; using namespace retinar::RETINAR_ISA;
struct Ctx{Pool*p; std::vector<Packed>* ms; Rows x; long rows; float* out;};
static void work(void*c,int t){auto&k=*(Ctx*)c; for(auto&m:*k.ms){auto s=share(m.units(),t,k.p->threads()); long stride=m.outer; float*out=k.out;
 multiply(m,k.x,k.rows,s.first,s.last,[=](long r,long u,const Vec*v){for(int i=0;i<unit_vectors;i++)store(out+r*stride+u*16+i*Vec::width,v[i]);});
 k.p->barrier();}}
int main(int argc,char**argv){ int T=atoi(argv[1]); Pool pool(T,false);
 // GPT-B: 12 layers dim 768 ffn 2048
 long E=argc>2?atol(argv[2]):768,F=argc>3?atol(argv[3]):2048,L=argc>4?atol(argv[4]):12;
 std::vector<Packed> ms; double bytes=0;
 auto add=[&](long o,long i){Packed m{nullptr,o,i,true,false}; long n=packed_elements(m); void*d=aligned_alloc(64,n*2); for(long j=0;j<n;j++)((unsigned short*)d)[j]=0x3c00+(j&63); m.data=d; ms.push_back(m); bytes+=n*2;};
 for(int l=0;l<L;l++){add(3*E,E);add(E,E);add(2*F,E);add(E,F);} add(16384,E);
 std::vector<Activation> x(64*4096,from_float<Activation>(0.01f)); std::vector<float> out(64*16384*2);
 for(long rows:{1L,2L,8L,32L}){Ctx c{&pool,&ms,{x.data(),4096},rows,out.data()}; double best=1e9; for(int it=0;it<6;it++){auto a=std::chrono::steady_clock::now(); pool.run(work,&c); double d=std::chrono::duration<double>(std::chrono::steady_clock::now()-a).count(); if(d<best)best=d;}
 printf("rows %ld: %.2f ms  %.1f GB/s %.0f GF/s\n",rows,best*1e3,bytes/best/1e9,bytes*rows/best/1e9);}
 // read bandwidth
 double best=1e9; for(int it=0;it<6;it++){auto a=std::chrono::steady_clock::now(); pool.run([](void*c,int t){auto&k=*(Ctx*)c; static volatile float sink; Vec s[8]; for(auto&v:s)v=broadcast(0); for(auto&m:*k.ms){long n=packed_elements(m)/32/8; auto sh=share(n,t,k.p->threads()); const float*p=(const float*)m.data; for(long i=sh.first;i<sh.last;i++)for(int j=0;j<8;j++)s[j]=s[j]+load(p+(i*8+j)*16);} sink=sum(s[0]+s[1]+s[2]+s[3]+s[4]+s[5]+s[6]+s[7]);}, new Ctx{&pool,&ms,{},0,nullptr}); double d=std::chrono::duration<double>(std::chrono::steady_clock::now()-a).count(); if(d<best)best=d;} printf("read %.1f GB/s\n",bytes/best/1e9);
}
